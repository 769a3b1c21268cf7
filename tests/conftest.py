"""Tiny real models, tokenizers and data that every test may use; made once per session, in a second."""

import copy
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.artifacts import DataDir, ModelCard
from components.base import architecture
from components.checkpoints import Checkpoints
from components.generation import Response
from components.generation.native import NativeSampler
from components.models import ScalarModel, policy_card, save_model, scalar_from_policy
from components.records import Conversation, Demonstration, Message, Preference, Prompt
from components.rl import algorithms
from components.rl.loop import num_updates, train
from components.rl.networks import PolicyAndValues
from components.rl.rollout import Models, PromptStream, RolloutSource
from components.rl.settings import PPOSettings, RLSettings
from components.settings import Compute, Generation, Optimizer, Training
from components.tokens import encode_prompt, load_tokenizer, template_digest
from components.updates import Updater

torch.set_num_threads(1)  # more threads only slow models of this size down

TINY = (32, 2, 2, 1, 64)
"""Hidden, layers, heads, key-value heads, feed-forward."""
WORDS = ("red", "blue", "green", "seven", "three", "north")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer of some 300 tokens, with a chat template."""
    texts = [f"which word follows {word}? yes, {word} it is. no, never {word}!" for word in WORDS]
    return architecture.train_tokenizer(texts, 300)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama of hidden size 32, its weights large enough that position and context matter."""
    torch.manual_seed(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architecture.SIZES, "1m", TINY)
        model = architecture.untrained_llama("1m", tokenizer, max_positions=128)
    _spread(model, 5.0)
    folder = tmp_path_factory.mktemp("models") / "policy"
    save_model(model, tokenizer, folder, policy_card("", "base", tokenizer), settings={}, parents={})
    return folder


@pytest.fixture(scope="session")
def reward_folder(policy_folder: Path) -> Path:
    """A reward model on the policy's backbone with a random head, mean 0.5 and deviation 2."""
    return _scalar_folder(policy_folder, "reward", 0.5, 2.0)


@pytest.fixture(scope="session")
def cost_folder(policy_folder: Path) -> Path:
    """A cost model on the policy's backbone with a random head and deviation 2."""
    return _scalar_folder(policy_folder, "cost", 0.0, 2.0)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An easy task: repeat the word, yes is better and safe, no worse and unsafe; 24 train, 6 test rows."""
    folder = tmp_path_factory.mktemp("data") / "data"
    records: dict[tuple[str, str], list[Any]] = {}
    for split, numbers in (("train", range(24)), ("test", range(24, 30))):
        for number in numbers:
            word = WORDS[number % len(WORDS)]
            prompt = (Message("user", f"say {word} {number}"),)
            records.setdefault(("demonstrations", split), []).append(
                Demonstration(f"d{number}", prompt, f"yes, {word}", "made")
            )
            for dimension in ("helpful", "harmless"):
                records.setdefault(("preferences", split), []).append(
                    Preference(
                        f"{dimension}{number}", prompt, "yes", "no, never", dimension, True, False, "made"
                    )
                )
            records.setdefault(("prompts", split), []).append(Prompt(f"p{number}", prompt, "made", "fact"))
    DataDir.write(folder, records, {}, {})
    return folder


@pytest.fixture
def quick_training() -> Callable[..., Training]:
    """Training settings for tiny models: fp32, a constant rate of 0.01, and what is named."""

    def settings(**fields: Any) -> Training:
        defaults: dict[str, Any] = {
            "batch_tokens": 256,
            "max_length": 64,
            "optimizer": Optimizer(lr=0.01, schedule="constant", warmup=0.0),
            "compute": Compute(dtype="fp32"),
        }
        return Training(**(defaults | fields))

    return settings


def _scalar_folder(policy_folder: Path, kind: str, mean: float, std: float) -> Path:
    folder = policy_folder.parent / kind
    scalar = scalar_from_policy(policy_folder)
    torch.manual_seed(len(kind))
    nn.init.normal_(scalar.model.score.weight, std=0.3)
    tokenizer = load_tokenizer(policy_folder)
    card = ModelCard(kind, "", kind, template_digest(tokenizer), mean, std)
    save_model(scalar.model, tokenizer, folder, card, settings={}, parents={"policy": policy_folder})
    return folder


@torch.no_grad()
def _spread(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter *= factor


@pytest.fixture(scope="session")
def emulator() -> Iterator[str]:
    """The address of a running object-store emulator with one bucket, gs://feedback."""
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="feedback")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["local", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address under which a test may write: a folder, or a folder of the bucket."""
    if request.param == "local":
        return str(tmp_path / "store")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("emulator"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    return f"gs://feedback/{tmp_path.name}"


class WordScorer:
    """Scores a response by its first word."""

    def __init__(self, scores: dict[str, float], sign: float = 1.0) -> None:
        self.scores, self.sign = scores, sign

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Scores (B,)."""
        words = [(response.text.split() or [""])[0] for response in responses]
        return torch.tensor([self.sign * self.scores.get(word, 0.0) for word in words])


class Bandit:
    """A problem that a tiny Llama learns in seconds: which of four words to say first."""

    words = ("a", "b", "c", "d")

    def __init__(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "say", *self.words]
        words = Tokenizer(
            models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<|pad|>")
        )
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<|pad|>",
            eos_token="<|end|>",
            additional_special_tokens=["<|user|>", "<|assistant|>"],
        )
        self.tokenizer.chat_template = architecture.CHAT_TEMPLATE
        self.prompts = [(Message("user", "say"),)]

    def learn(
        self, settings: RLSettings, reward: WordScorer, cost: WordScorer | None = None
    ) -> dict[str, float]:
        """The probability of each first word after learning, under "p/<word>", and the last metrics."""
        torch.manual_seed(settings.seed)
        algorithm = algorithms.build(settings.algorithm, lambda tensor: tensor)
        critics = [self._critic(), None if cost is None else self._critic()]
        networks = PolicyAndValues(self._network("LlamaForCausalLM"), critics[0], critics[1], 1.0)
        reference = copy.deepcopy(networks.policy)
        critic = settings.optimizer.model_copy(update={"lr": settings.critic_lr})
        critics_too = {"value": critic, "cost_value": critic}
        updater = Updater(networks, settings.optimizer, settings.compute, num_updates(settings, 1), critics_too)
        sampler = NativeSampler(
            networks.policy, self.tokenizer.eos_token_id, settings.generation, settings.seed
        )
        models = Models(networks, reference, sampler, reward, cost, self.tokenizer, updater.accelerator.autocast)
        source = RolloutSource(
            models,
            PromptStream(self.prompts, 0),
            settings.prompts_per_rollout,
            1,
            8,
            settings.micro_batch_size,
        )
        metrics = train(
            settings, algorithm, source, updater, sampler.generator, Checkpoints(Path("unused"), 0)
        )
        return metrics | self._probabilities(networks.policy)

    def settings(self, algorithm: PPOSettings, **fields: Any) -> RLSettings:
        """Settings under which the problem is learned in a second or two."""
        defaults: dict[str, Any] = {
            "algorithm": algorithm,
            "rollouts": 30,
            "prompts_per_rollout": 64,
            "minibatch_size": 32,
            "micro_batch_size": 32,
            "generation": Generation(max_new_tokens=2),
            "optimizer": Optimizer(lr=0.01, schedule="constant", warmup=0.0),
            "critic_lr": 0.01,
            "compute": Compute(dtype="fp32"),
        }
        return RLSettings(**(defaults | fields))

    def _network(self, kind: str, **fields: Any) -> Any:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **fields,
        )
        return getattr(transformers, kind)(config)

    def _critic(self) -> ScalarModel:
        return ScalarModel(self._network("LlamaForSequenceClassification", num_labels=1))

    @torch.no_grad()
    def _probabilities(self, policy: Any) -> dict[str, float]:
        logits = policy.eval()(torch.tensor([encode_prompt(self.tokenizer, self.prompts[0])])).logits[0, -1]
        ids = self.tokenizer.convert_tokens_to_ids(list(self.words))
        return {f"p/{word}": p for word, p in zip(self.words, logits.softmax(-1)[ids].tolist(), strict=True)}


@pytest.fixture(scope="session")
def bandit() -> Bandit:
    """A problem that an algorithm learns in a second or two."""
    return Bandit()


@pytest.fixture(scope="session")
def word_scorer() -> type[WordScorer]:
    """A scorer that likes some first words."""
    return WordScorer
