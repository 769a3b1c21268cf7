"""Tiny real models, tokenizers and data that every test may use; made once per session, in a second."""

import copy
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.base import architecture
from components.checkpoints import Checkpoints
from components.generation import Response
from components.generation.native import NativeSampler
from components.models import ScalarModel
from components.records import Conversation, Message, Preference
from components.rl import algorithms
from components.rl.alerts import rl_monitor
from components.rl.algorithm_settings import AlgorithmSettings
from components.rl.algorithms.dpo import DPO
from components.rl.drafts import Drafting, Models
from components.rl.loop import num_updates, train
from components.rl.networks import Networks
from components.rl.pairs import PairLogprobs, PairSource, encode_pairs
from components.rl.reference import FrozenReference, Reference
from components.rl.rollout import RolloutSource
from components.rl.settings import RLSettings
from components.rl.stream import Stream
from components.rl.types import Batch, Forward, Learner, Rollout, Source, micro_rows
from components.settings import Compute, Generation, Optimizer, Training
from components.storage import patience
from components.storage.patience import Patience
from components.tokens import encode_prompt
from components.updates import Updater
from object_store import ObjectStore
from starts import Starts
from tiny_models import make_data, make_policy, make_scalar, make_tokenizer

torch.set_num_threads(1)  # more threads only slow models of this size down

@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer of some 300 tokens, with a chat template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama of hidden size 32, its weights large enough that position and context matter."""
    return make_policy(tmp_path_factory.mktemp("models") / "policy", tokenizer)


@pytest.fixture(scope="session")
def reward_folder(policy_folder: Path) -> Path:
    """A reward model on the policy's backbone with a random head, mean 0.5 and deviation 2."""
    return make_scalar(policy_folder.parent / "reward", policy_folder, "reward", 0.5, 2.0)


@pytest.fixture(scope="session")
def cost_folder(policy_folder: Path) -> Path:
    """A cost model on the policy's backbone with a random head and deviation 2."""
    return make_scalar(policy_folder.parent / "cost", policy_folder, "cost", 0.0, 2.0)


@pytest.fixture(scope="session")
def adapted_reward(policy_folder: Path) -> Path:
    """A reward model that was trained with adapters on the policy, mean 0.5 and deviation 2."""
    return make_scalar(policy_folder.parent / "adapted-reward", policy_folder, "reward", 0.5, 2.0, rank=4)


@pytest.fixture(scope="session")
def adapted_cost(policy_folder: Path) -> Path:
    """A cost model that was trained with adapters on the policy, deviation 2."""
    return make_scalar(policy_folder.parent / "adapted-cost", policy_folder, "cost", 0.0, 2.0, rank=2)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An easy task: repeat the word, yes is better and safe, no worse and unsafe; 24 train, 6 test rows."""
    return make_data(tmp_path_factory.mktemp("data") / "data")


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


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Lets gs:// mean the server at an address, with little patience and a cache of its own."""

    def turn_to(address: str) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(patience, "PATIENCE", Patience(initial_s=0.001, maximum_s=0.01, total_s=120, silence_s=30))

    return turn_to


@pytest.fixture
def bucket(emulator: str, reach: Callable[[str], None], tmp_path: Path) -> str:
    """A folder of the emulator's bucket for one test."""
    reach(emulator)
    return f"gs://feedback/{tmp_path.name}"


@pytest.fixture(params=["local", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address under which a test may write: a folder, or a folder of the bucket."""
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("bucket"))


@pytest.fixture
def object_store(reach: Callable[[str], None]) -> Iterator[ObjectStore]:
    """A stand-in for Cloud Storage that knows generations, with one bucket, gs://bucket."""
    server = ObjectStore()
    reach(server.address)
    yield server
    server.close()


class WordScorer:
    """Scores a response by its first word."""

    def __init__(self, scores: dict[str, float], sign: float = 1.0) -> None:
        self.scores, self.sign = scores, sign
        self.metrics: dict[str, float] = {}

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
        algorithm = algorithms.build(settings.algorithm, lambda tensor: tensor, settings.generation.max_new_tokens)
        critics = [self._critic() if name in settings.critics else None for name in ("value", "cost_value")]
        networks = Networks(self._network("LlamaForCausalLM"), critics[0], critics[1], 1.0)
        reference = FrozenReference(copy.deepcopy(networks.policy), settings.compute.dtype)
        source: Source
        if isinstance(algorithm, DPO):
            source = self._pairs(settings, reward, reference)
        else:
            sampler = NativeSampler(networks.policy, self.tokenizer.eos_token_id, settings.generation, settings.seed)
            models = Models(sampler, reference, reward, cost, self.tokenizer, 1.0, settings.compute.dtype)
            size, micro = settings.prompts_per_rollout, settings.micro_batch_size
            drafts = Drafting(models, Stream(self.prompts, 0), size, algorithm.group_size, 8, micro)
            source = RolloutSource(drafts, networks, algorithm, size, micro, settings.max_weight)
        own = dict.fromkeys(("value", "cost_value"), settings.critic_optimizer)
        updates = num_updates(settings, settings.rollouts, source.rows_per_batch)
        updater = Updater(networks, settings.optimizer, settings.compute, updates, own)
        checkpoints = Checkpoints(Path("unused"), 0)
        monitor = rl_monitor(settings.alerts, settings.compute.dtype, settings.algorithm)
        course = train(settings, settings.rollouts, algorithm, source, updater, [], monitor, checkpoints)
        return course.history[-1].metrics | self._probabilities(networks.policy)

    def settings(self, algorithm: AlgorithmSettings, **fields: Any) -> RLSettings:
        """Settings under which the problem is learned in a second or two."""
        quick = Optimizer(lr=0.01, schedule="constant", warmup=0.0)
        defaults: dict[str, Any] = {
            "algorithm": algorithm,
            "rollouts": 30,
            "prompts_per_rollout": 64 // getattr(algorithm, "group_size", 1),
            "minibatch_size": 32,
            "micro_batch_size": 32,
            "generation": Generation(max_new_tokens=2),
            "optimizer": quick,
            "critic_optimizer": quick,
            "compute": Compute(dtype="fp32"),
        }
        return RLSettings(**(defaults | fields))

    def _pairs(self, settings: RLSettings, reward: WordScorer, reference: Reference) -> PairSource:
        """Every two words of which one scores higher, as people would have labelled them."""
        scores = {word: reward.sign * reward.scores.get(word, 0.0) for word in self.words}
        rows = [
            Preference(f"{better}{worse}", self.prompts[0], better, worse, "helpful", None, None, "made")
            for better, worse in permutations(self.words, 2)
            if scores[better] > scores[worse]
        ]
        stream = Stream(encode_pairs(rows, self.tokenizer, 8, settings.generation.max_new_tokens), 0)
        filler, pairs = self.tokenizer.eos_token_id, dict(enumerate(stream.rows))
        logprobs = PairLogprobs(lambda: reference, pairs, filler, settings.micro_batch_size)
        return PairSource(stream, logprobs, filler, settings.prompts_per_rollout)

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


def random_rollout(prompts: int, group_size: int = 1, width: int = 4, seed: int = 0, **fields: Any) -> Rollout:
    """A rollout of random numbers; responses have 1 to `width` tokens, every third did not end."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * group_size

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    defaults: dict[str, Any] = {
        "input_ids": torch.randint(0, 50, (rows, 2 + width), generator=generator),
        "attention_mask": torch.cat([torch.ones(rows, 2, dtype=torch.bool), mask], 1),
        "mask": mask,
        "logprobs": -numbers(rows, width).abs() * mask,
        "ref_logprobs": -numbers(rows, width).abs() * mask,
        "scores": numbers(rows),
        "ended": torch.arange(rows) % 3 != 2,
        "costs": numbers(rows),
        "values": numbers(rows, width),
        "cost_values": numbers(rows, width),
        "group_size": group_size,
    }
    return Rollout(**(defaults | fields))


@pytest.fixture(scope="session", name="random_rollout")
def random_rollout_fixture() -> Callable[..., Rollout]:
    """Makes rollouts of random numbers."""
    return random_rollout


def update_gradient(learner: Learner, batch: Batch, micro: int) -> tuple[Tensor, dict[str, float]]:
    """The gradient of an update's loss, its rows taken `micro` at a time, and the means it logs.

    The gradient (4, B, R) is that with respect to log-probabilities, entropies, values and cost values, all random.
    """
    outputs = 0.3 * torch.randn(4, *batch.mask.shape, generator=torch.Generator().manual_seed(1))
    outputs[0] += 0.0 if batch.logprobs is None else batch.logprobs
    outputs.requires_grad_()
    terms, sums = learner.terms(batch), dict[str, tuple[float, float]]()
    for rows in micro_rows(batch.attention_mask, micro, batch.unit):
        loss, means = learner.loss(batch.rows(rows), Forward(*outputs[:, rows]))
        (loss / terms).backward()
        for name, (value, count) in means.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + value, before[1] + count
    assert outputs.grad is not None
    return outputs.grad, {name: value / count for name, (value, count) in sums.items()}


@pytest.fixture(scope="session", name="update_gradient")
def update_gradient_fixture() -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The gradient and the means of an update whose rows are taken some at a time."""
    return update_gradient


@pytest.fixture(scope="session")
def starts() -> Starts:
    """Starts steps, kills them and starts them again."""
    return Starts()
