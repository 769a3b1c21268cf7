"""Adapters apart from their base, and scorers as guests on the policy: the same scores, and a policy left as it was."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.adapters import CONFIG, HEAD, WEIGHTS, switched
from components.artifacts import ADAPTER, ModelCard, folder_digest, read_json, write_json
from components.errors import InputError
from components.generation import Response
from components.generation.families import is_known
from components.generation.native import NativeSampler
from components.models import load_policy, load_scalar, policy_card, save_model, with_lora
from components.packed import pack, rows_of, whole_rows
from components.records import Message
from components.rl.networks import Networks, SharedHead
from components.rl.reference import AdapterOff, FrozenReference
from components.scoring import ModelScorer, SharedBackbone, build_scorer, load_scorer
from components.settings import Compute, EnsembleScorerSettings, Generation, Lora, Optimizer
from components.updates import Updater
from tiny_models import make_scalar

PROMPTS = [(Message("user", f"say {word}"),) for word in ("red", "blue", "seven three")]
RESPONSES = [Response(text, (1, 2), True) for text in ("yes, red", "no, never", "yes, seven three it is")]
IDS = torch.tensor([[9, 10, 11, 40, 41, 42], [0, 12, 13, 43, 44, 0]])
MASK = torch.tensor([[True] * 6, [False, True, True, True, True, False]])
LENGTH = 3


def learned(policy: Any) -> Any:
    """The policy, its adapters no longer at zero."""
    torch.manual_seed(3)
    for name, parameter in policy.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


@pytest.fixture
def policy(policy_folder: Path) -> Any:
    return learned(with_lora(load_policy(policy_folder), Lora(rank=3)))


@pytest.fixture
def shared(policy: Any, policy_folder: Path) -> SharedBackbone:
    return SharedBackbone(policy, folder_digest(policy_folder), load_scorer)


@pytest.fixture
def copied(adapted_reward: Path, tmp_path: Path) -> Path:
    """A reward model's folder of the test's own."""
    return shutil.copytree(adapted_reward, tmp_path / "copied")


def score(scorer: Any) -> Tensor:
    found = scorer.score(PROMPTS, RESPONSES)
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def logits(policy: Any) -> Tensor:
    found = policy(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    return found


def condition(policy: Any) -> tuple[list[bool], list[str], list[bool]]:
    """What switching must not change: gradients, the active adapter, every layer's own note of it."""
    layers = [module for module in policy.modules() if hasattr(module, "lora_A")]
    assert layers
    own = [layer.active_adapters == ["default"] and not layer.disable_adapters for layer in layers]
    return [p.requires_grad for p in policy.parameters()], policy.active_adapters, own


def test_peft_itself_reads_the_adapter_and_gives_the_merged_model_s_logits(
    adapted_reward: Path, policy_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    bare = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1, pad_token_id=0)
    apart = PeftModel.from_pretrained(bare, adapted_reward / ADAPTER).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(adapted_reward).eval()
    with torch.no_grad():
        expected = merged(input_ids=IDS[:1]).logits
        torch.testing.assert_close(apart(input_ids=IDS[:1]).logits, expected, atol=1e-5, rtol=1e-5)
        with apart.disable_adapter():
            assert (apart(input_ids=IDS[:1]).logits - expected).abs().max() > 0.01


def test_an_adapter_is_written_alike_wherever_its_base_lay(
    policy_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    digests = set[str]()
    for name in ("here", "elsewhere"):
        base = shutil.copytree(policy_folder, tmp_path / name / "policy")
        torch.manual_seed(0)
        model = with_lora(load_policy(base), Lora(rank=2), task_type="SEQ_CLS")
        card = ModelCard("reward", folder_digest(base), "reward", "")
        digests.add(save_model(model, tokenizer, tmp_path / name / "m", card, settings={}, parents={}))
        text = (tmp_path / name / "m" / ADAPTER / CONFIG).read_text()
        assert str(tmp_path) not in text and json.loads(text)["r"] == 2
    assert len(digests) == 1


def test_only_a_scalar_model_with_adapters_keeps_them_apart(
    policy: Any, reward_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    save_model(policy, tokenizer, tmp_path / "m", policy_card("", "rl", tokenizer), settings={}, parents={})
    assert not (tmp_path / "m" / ADAPTER).exists() and not (reward_folder / ADAPTER).exists()


def test_a_guest_scores_as_its_merged_model_does(
    shared: SharedBackbone, adapted_reward: Path, adapted_cost: Path
) -> None:
    guests = {folder: shared.load(folder) for folder in (adapted_reward, adapted_cost)}
    for _ in range(2):  # each after the other, too
        for folder, guest in guests.items():
            expected = score(load_scorer(folder))
            torch.testing.assert_close(score(guest), expected, atol=2e-6, rtol=1e-5)
            assert guest.model.model is shared.host and expected.std() > 0.01
    assert (score(guests[adapted_reward]) - score(guests[adapted_cost])).abs().max() > 0.1


def test_adding_and_reading_guests_leaves_the_policy_to_the_bit_as_it_was(
    policy: Any, shared: SharedBackbone, adapted_reward: Path, adapted_cost: Path
) -> None:
    before, (flags, active, own), random = logits(policy), condition(policy), torch.get_rng_state()
    own_size = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    guests = [shared.load(folder) for folder in (adapted_reward, adapted_cost)]
    assert torch.equal(torch.get_rng_state(), random)
    now, still_active, still_own = condition(policy)
    assert (still_active, still_own) == (active, own) and sum(now) == sum(flags)
    for guest in guests:
        score(guest)
        assert condition(policy) == (now, active, own) and torch.equal(logits(policy), before)
    assert sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad) == own_size


def test_a_policy_that_nothing_trains_stays_frozen(
    policy: Any, shared: SharedBackbone, adapted_reward: Path
) -> None:
    policy.requires_grad_(False)
    score(shared.load(adapted_reward))
    assert not any(parameter.requires_grad for parameter in policy.parameters())


def test_a_reading_that_fails_leaves_the_policy_as_it_was(
    policy: Any, shared: SharedBackbone, adapted_reward: Path
) -> None:
    guest = shared.load(adapted_reward)
    before, stood = logits(policy), condition(policy)
    with pytest.raises(IndexError):
        guest.model(pack(policy, whole_rows(IDS + 10_000, MASK)), torch.tensor([0]))
    assert torch.equal(logits(policy), before) and condition(policy) == stood
    with switched(policy, guest.model.name):
        assert policy.active_adapters == [guest.model.name] and not torch.equal(logits(policy), before)
    assert torch.equal(logits(policy), before) and condition(policy) == stood


def test_the_policy_samples_is_read_and_is_saved_as_without_guests(
    policy: Any, policy_folder: Path, tokenizer: Any, adapted_reward: Path, adapted_cost: Path, tmp_path: Path
) -> None:
    alone = learned(with_lora(load_policy(policy_folder), Lora(rank=3)))
    alone.load_state_dict(policy.state_dict())
    shared = SharedBackbone(policy, folder_digest(policy_folder), load_scorer)
    for folder in (adapted_reward, adapted_cost):
        score(shared.load(folder))
    assert is_known(policy)
    generation = Generation(max_new_tokens=8)
    sampled = [
        NativeSampler(model, tokenizer.eos_token_id, generation, seed=1).sample([[9, 10], [11]], 2)
        for model in (alone, policy)
    ]
    assert torch.equal(sampled[0].ids, sampled[1].ids) and torch.equal(sampled[0].logprobs, sampled[1].logprobs)
    given = IDS, MASK, LENGTH, 1.0, [torch.arange(2)]
    start = FrozenReference(load_policy(policy_folder), "fp32").logprobs(*given)
    torch.testing.assert_close(AdapterOff(policy, "fp32").logprobs(*given), start, atol=1e-6, rtol=0)
    card = policy_card("", "rl", tokenizer)
    digests = [
        save_model(model, tokenizer, tmp_path / "m", card, settings={}, parents={}) for model in (alone, policy)
    ]
    assert digests[0] == digests[1]


def test_guests_are_no_part_of_what_is_trained_and_checkpointed(
    policy: Any, shared: SharedBackbone, adapted_reward: Path
) -> None:
    networks = Networks(policy, SharedHead(policy.config.hidden_size))
    trained = {name for name, parameter in networks.named_parameters() if parameter.requires_grad}
    guest = shared.load(adapted_reward)
    score(guest)
    updater = Updater(networks, Optimizer(lr=0.01), Compute(dtype="fp32"), 1)
    weights = {name: p.clone() for name, p in policy.named_parameters() if guest.model.name in name}
    assert len(weights) == 28
    networks(IDS, MASK, LENGTH).logprobs.sum().backward()
    updater.step()
    score(guest)
    assert {name for name in updater.state() if name.startswith("model.")} == {f"model.{name}" for name in trained}
    for name, parameter in policy.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name]) and parameter.grad is None



@pytest.mark.parametrize("misfit", ["whole policy", "whole scorer", "another base"])
def test_a_scorer_that_does_not_fit_is_a_model_of_its_own_and_says_why(
    misfit: str, policy_folder: Path, policy: Any, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = load_policy(policy_folder) if misfit == "whole policy" else policy
    if misfit == "whole scorer":
        shutil.rmtree(copied / ADAPTER)
    digest = "0" * 64 if misfit == "another base" else folder_digest(policy_folder)
    reason = {
        "whole policy": "the policy's own weights are trained (rl.lora.rank is 0)",
        "whole scorer": "it was trained without adapters (lora.rank is 0), or by an earlier version",
        "another base": f"it was trained on another model than the policy ({folder_digest(policy_folder)[:12]}, not 0",
    }[misfit]
    with caplog.at_level(logging.INFO, logger="components.scoring.shared"):
        scorer = SharedBackbone(host, digest, load_scorer).load(copied)
    (line,) = caplog.messages
    assert line.startswith(f"{copied} is loaded as a model of its own: {reason}")
    assert torch.equal(score(scorer), score(load_scorer(copied)))
    assert list(getattr(host, "peft_config", {})) in ([], ["default"])


def broken(change: str, folder: Path) -> None:
    """Damage an adapter in one way."""
    config, tensors = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    some = next(name for name in tensors if "lora_B" in name)
    match change:
        case "config absent":
            (folder / CONFIG).unlink()
        case "weights absent":
            (folder / WEIGHTS).unlink()
        case "truncated":
            (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
        case "kind":
            write_json(folder / CONFIG, config | {"peft_type": "IA3"})
        case "head":
            save_file({name: tensor for name, tensor in tensors.items() if name != HEAD}, folder / WEIGHTS)
        case "one absent":
            save_file({name: tensor for name, tensor in tensors.items() if name != some}, folder / WEIGHTS)
        case "one too many":
            save_file(tensors | {some.replace("layers.0", "layers.9"): tensors[some].clone()}, folder / WEIGHTS)
        case "shape":
            save_file(tensors | {some: torch.zeros(3, 4)}, folder / WEIGHTS)
        case "layers":
            write_json(folder / CONFIG, config | {"target_modules": ["nowhere"]})


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "config absent": r"adapter_config.json: no such file",
        "weights absent": r"adapter: the adapter cannot be used \(No such file",
        "truncated": r"adapter: the adapter cannot be used \(.*[Ii]ncomplete",
        "kind": r"cannot be used \(adapter_config.json says peft_type 'IA3'; accepted: LORA\)",
        "head": r"cannot be used \(adapter_model.safetensors holds no base_model.model.score.weight\)",
        "one absent": r"cannot be used \(\S+lora_B\S+ is not in both the adapter and the model\)",
        "one too many": r"cannot be used \(\S+layers.9\S+ is not in both the adapter and the model\)",
        "shape": r"cannot be used \(Error\(s\) in loading",
        "layers": r"cannot be used \(Target modules",
    }.items(),
)
def test_an_adapter_that_cannot_be_used_is_one_message(
    change: str, words: str, policy: Any, shared: SharedBackbone, copied: Path
) -> None:
    broken(change, copied / ADAPTER)
    with pytest.raises(InputError, match=words) as raised:
        shared.load(copied)
    assert str(copied / ADAPTER) in str(raised.value) and "\n" not in str(raised.value)


def test_all_members_of_an_ensemble_are_guests(
    policy: Any, shared: SharedBackbone, adapted_reward: Path, copied: Path
) -> None:
    shutil.copytree(adapted_reward, copied / "members" / "1")
    tensors = load_file(copied / "members" / "1" / ADAPTER / WEIGHTS)
    save_file(tensors | {HEAD: 2 * tensors[HEAD]}, copied / "members" / "1" / ADAPTER / WEIGHTS)
    scorer: Any = build_scorer(EnsembleScorerSettings(), copied, "reward", shared.load)
    assert [member.model.model for member in scorer.members] == [policy, policy]
    first, second = (score(member) for member in scorer.members)
    torch.testing.assert_close(second * 2 + 0.5, 2 * (first * 2 + 0.5))  # raw scores: deviation 2, mean 0.5
    torch.testing.assert_close(score(scorer), (first + second) / 2)


def saved_bytes(policy: Any, checkpointing: bool) -> tuple[int, list[Tensor]]:
    """What a forward pass keeps for the backward pass, and the gradients that come of it."""
    torch.manual_seed(5)
    head = SharedHead(policy.config.hidden_size)
    nn.init.normal_(head.layers[-1].weight)
    networks = Networks(policy, head)
    Updater(networks, Optimizer(), Compute(dtype="fp32", gradient_checkpointing=checkpointing), 1)
    networks.train()
    kept = dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in networks.parameters()}
    ids = IDS.repeat(4, 10)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward = networks(ids, torch.ones_like(ids, dtype=torch.bool), LENGTH)
    assert forward.values is not None
    (forward.logprobs.sum() + forward.values.square().sum()).backward()
    gradients = [parameter.grad for parameter in networks.parameters() if parameter.grad is not None]
    return sum(size for pointer, size in kept.items() if pointer not in weights), gradients


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient_beside_guests(
    policy: Any, policy_folder: Path, shared: SharedBackbone, adapted_reward: Path
) -> None:
    guest = shared.load(adapted_reward)
    expected, stood = score(guest), condition(policy)
    whole, plain = saved_bytes(policy, checkpointing=False)
    policy.zero_grad()
    less, same = saved_bytes(policy, checkpointing=True)
    assert less < whole / 3 and len(plain) == len(same) == 32
    for one, other in zip(plain, same, strict=True):
        torch.testing.assert_close(one, other)
    assert policy.get_base_model().is_gradient_checkpointing
    policy.train()
    assert torch.equal(score(guest), expected) and condition(policy) == stood


def test_a_frozen_scorer_in_bf16_gives_nearly_the_same_scores(reward_folder: Path) -> None:
    full, half = load_scorer(reward_folder), load_scorer(reward_folder, "bf16")
    assert isinstance(half, ModelScorer)
    assert {parameter.dtype for parameter in half.model.model.model.parameters()} == {torch.bfloat16}
    assert 0 < (score(full) - score(half)).abs().max() < 0.05
    assert score(half).dtype == torch.float32
    assert load_scalar(reward_folder).model.dtype == torch.float32


def test_a_guest_reads_packed_rows_that_share_a_prompt(
    policy: Any, shared: SharedBackbone, adapted_reward: Path
) -> None:
    guest = shared.load(adapted_reward)
    rows = rows_of(IDS[:1].repeat(4, 1), MASK[:1].repeat(4, 1), LENGTH)
    packed = pack(policy, rows)
    found = guest.model(packed, packed.ends)
    torch.testing.assert_close(found, load_scalar(adapted_reward)(packed, packed.ends), atol=2e-6, rtol=1e-5)


def tiny(family: str, tokenizer: Any, folder: Path) -> Path:
    """A policy of a family that scalar models are read of."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
    if family == "GPT2":
        sizes, more = {"n_embd": 16, "n_layer": 2, "n_head": 2}, {"n_positions": 128}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, **sizes, **more,
    )  # fmt: skip
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    save_model(model, tokenizer, folder, policy_card("", "base", tokenizer), settings={}, parents={})
    return folder


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Gemma", "GPT2"])
def test_the_other_families_have_guests_too(family: str, tokenizer: Any, tmp_path: Path) -> None:
    base = tiny(family, tokenizer, tmp_path / "policy")
    folder = make_scalar(tmp_path / "reward", base, "reward", 0.0, 1.0, rank=2)
    host = with_lora(load_policy(base), Lora(rank=3))
    before = logits(host)
    guest = SharedBackbone(host, folder_digest(base), load_scorer).load(folder)
    assert guest.model.model is host
    found, expected = score(guest), score(load_scorer(folder))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.01 and torch.equal(logits(host), before)
