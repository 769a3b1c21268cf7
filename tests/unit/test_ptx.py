"""The SFT loss mixed into updates: its gradient, its weight, and which demonstrations an update gets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.models import load_policy, load_scalar
from components.phases import Phases
from components.records import Demonstration, Message
from components.rl.networks import Networks
from components.rl.ptx import Ptx
from components.rl.settings import PtxSettings
from components.settings import Compute, Optimizer
from components.tokens import encode_prompt, encode_response, load_tokenizer
from components.updates import Updater

ROWS = [
    Demonstration(str(number), (Message("user", f"say {word} {number}"),), f"yes, {word}", "made")
    for number, word in enumerate(("red", "blue", "green", "seven", "three", "north"))
]
STILL = Optimizer(lr=1e-9, schedule="constant", warmup=0.0, max_grad_norm=1e9)


def ptx(folder: Path, size: int = 6, coef: float = 2.0, seed: int = 0, limits: tuple[int, int] = (64, 64)) -> Ptx:
    return Ptx(PtxSettings(coef=coef, batch_size=size), ROWS, load_tokenizer(folder), *limits, seed)


def updater_of(networks: nn.Module) -> Updater:
    return Updater(networks, STILL, Compute(dtype="fp32"), 10)


def gradients(networks: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in networks.named_parameters() if p.grad is not None}


def naive_loss(policy: Any, folder: Path, rows: list[Demonstration]) -> tuple[Tensor, int]:
    """The summed cross-entropy of the responses, one after the other, and their tokens."""
    tokenizer, total, tokens = load_tokenizer(folder), torch.zeros(()), 0
    for row in rows:
        prompt, response = encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.response)
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total = total + nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
        tokens += len(response)
    return total, tokens


def test_the_gradient_is_that_of_the_mean_token_loss_times_the_weight(policy_folder: Path) -> None:
    # The networks sample at another temperature; the demonstrations were not sampled.
    networks = Networks(load_policy(policy_folder), temperature=0.5)
    metrics = ptx(policy_folder, coef=2.0).backward(updater_of(networks))
    policy = load_policy(policy_folder)
    loss, tokens = naive_loss(policy, policy_folder, ROWS)
    (2.0 * loss / tokens).backward()
    assert metrics == {"loss/ptx": pytest.approx(loss.item() / tokens, rel=1e-4)}
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradients(networks)[f"policy.{name}"], gradient, atol=1e-4, rtol=1e-3)


def test_it_is_timed_by_itself_and_by_its_own_tokens(policy_folder: Path) -> None:
    phases, tokenizer = Phases(), load_tokenizer(policy_folder)
    mixed = Ptx(PtxSettings(coef=2.0, batch_size=6), ROWS, tokenizer, 64, 64, 0, phases)
    with phases.phase("update"):
        mixed.backward(updater_of(Networks(load_policy(policy_folder))))
    metrics = phases.lap()
    encoded = [encode_prompt(tokenizer, row.prompt) + encode_response(tokenizer, row.response) for row in ROWS]
    assert metrics["perf/ptx_s"] * metrics["perf/ptx_tokens_per_s"] == pytest.approx(sum(map(len, encoded)))
    assert metrics["perf/ptx_s"] > 0 and metrics["perf/update_s"] > 0


def test_it_adds_to_the_gradient_that_is_there_and_makes_no_step(policy_folder: Path) -> None:
    networks = Networks(load_policy(policy_folder))
    updater = updater_of(networks)
    name = "policy.model.embed_tokens.weight"
    updater.backward(dict(networks.named_parameters())[name].sum(), 1.0)
    ptx(policy_folder, coef=1.0).backward(updater)
    both = gradients(networks)[name]
    alone = Networks(load_policy(policy_folder))
    ptx(policy_folder, coef=1.0).backward(updater_of(alone))
    torch.testing.assert_close(both - 1, gradients(alone)[name], atol=1e-4, rtol=1e-3)
    assert updater.update == 0


def test_no_critic_is_read_or_trained(policy_folder: Path, reward_folder: Path) -> None:
    networks = Networks(load_policy(policy_folder), load_scalar(reward_folder))

    def read(*_: Any) -> None:
        raise AssertionError("the critic was read")

    networks.value.register_forward_pre_hook(read)  # type: ignore[union-attr]
    ptx(policy_folder).backward(updater_of(networks))
    assert gradients(networks) and not [name for name in gradients(networks) if not name.startswith("policy.")]


def test_which_demonstrations_an_update_gets_follows_from_its_number_and_the_seed(policy_folder: Path) -> None:
    def losses(seed: int, updates: range) -> list[float]:
        networks = Networks(load_policy(policy_folder))
        updater, mixed = updater_of(networks), ptx(policy_folder, size=1, seed=seed)
        found = []
        for update in updates:
            updater.update = update
            found.append(mixed.backward(updater)["loss/ptx"])
        return found

    straight = losses(0, range(6))
    assert losses(0, range(3, 6)) == straight[3:]  # as after a stop
    assert losses(1, range(6)) != straight
    policy = load_policy(policy_folder)
    with torch.no_grad():
        each = [float(loss) / tokens for loss, tokens in (naive_loss(policy, policy_folder, [row]) for row in ROWS)]
    assert sorted(straight) == pytest.approx(sorted(each), rel=1e-4)  # every one once in a pass
    assert straight != pytest.approx(each, rel=1e-4)


def test_prompts_keep_their_last_tokens_and_responses_their_first(policy_folder: Path) -> None:
    tokenizer = load_tokenizer(policy_folder)
    for (prompt, response), row in zip(ptx(policy_folder, limits=(4, 2)).stream.rows, ROWS, strict=True):
        assert prompt == encode_prompt(tokenizer, row.prompt)[-4:]
        assert response == encode_response(tokenizer, row.response)[:2]
