"""The networks under training: one temperature, values where tokens are chosen, heads that cannot harm the policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.logprobs import response_logprobs
from components.models import autocast, load_policy, load_scalar
from components.rl.assembly import build_networks
from components.rl.networks import Networks, SharedHead, in_order, in_parts
from components.rl.settings import RLSettings

IDS = torch.tensor([[9, 10, 11, 40, 41, 42], [0, 12, 13, 43, 44, 0]])
MASK = torch.tensor([[True] * 6, [False, True, True, True, True, False]])
LENGTH = 3


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> Any:
    return load_policy(policy_folder)


def shared(policy: Any, seed: int = 0) -> SharedHead:
    """A head whose last layer is not zero any more."""
    torch.manual_seed(seed)
    head = SharedHead(policy.config.hidden_size)
    nn.init.normal_(head.layers[-1].weight)
    return head


def test_logprobs_and_entropies_are_those_of_the_policy_at_its_temperature(policy: Any) -> None:
    networks = Networks(policy, temperature=0.5)
    for given, temperature in (({}, 0.5), ({"temperature": 1.0}, 1.0), ({"temperature": 2.0}, 2.0)):
        forward = networks(IDS, MASK, LENGTH, **given)
        logprobs, entropy = response_logprobs(policy, IDS, MASK, LENGTH, temperature)
        assert torch.equal(forward.logprobs, logprobs) and torch.equal(forward.entropy, entropy)
        assert forward.values is None and forward.cost_values is None


@torch.no_grad()
def test_each_critic_has_its_own_values_of_the_states_before_the_tokens(
    policy: Any, reward_folder: Path, cost_folder: Path
) -> None:
    reward, cost = load_scalar(reward_folder), load_scalar(cost_folder)
    forward = Networks(policy, reward, cost)(IDS, MASK, LENGTH)
    assert forward.values is not None and forward.cost_values is not None
    for values, critic in ((forward.values, reward), (forward.cost_values, cost)):
        assert values is not None
        for place in range(LENGTH):  # the score of a row that ends before the token
            expected = critic.score(IDS[:, : LENGTH + place], MASK[:, : LENGTH + place])
            torch.testing.assert_close(values[0, place], expected[0])
            torch.testing.assert_close(values[1, place], expected[1] if place < 2 else torch.tensor(0.0))
    without = Networks(policy, reward, cost)(IDS, MASK, LENGTH, critics=False)
    assert without.values is None and without.cost_values is None
    assert torch.equal(without.logprobs, forward.logprobs)


@pytest.mark.parametrize("kind", ["shared", "own"])
@torch.no_grad()
def test_a_value_depends_on_what_was_said_before_its_token_and_on_nothing_later(
    kind: str, policy: Any, reward_folder: Path
) -> None:
    networks = Networks(policy, shared(policy) if kind == "shared" else load_scalar(reward_folder))
    before = networks(IDS, MASK, LENGTH).values
    for place in range(LENGTH):
        other = IDS.clone()
        other[0, LENGTH + place] = 50
        changed = (networks(other, MASK, LENGTH).values - before)[0].abs() > 1e-5
        assert changed.tolist() == [later > place for later in range(LENGTH)]


@torch.no_grad()
def test_a_head_reads_the_last_hidden_states(policy: Any) -> None:
    head, other = shared(policy, 1), shared(policy, 2)
    forward = Networks(policy, head, other)(IDS, MASK, LENGTH)
    hidden = policy(
        input_ids=IDS[:1], attention_mask=MASK[:1].long(), output_hidden_states=True
    ).hidden_states[-1]
    assert forward.values is not None and forward.cost_values is not None
    for values, read in ((forward.values, head), (forward.cost_values, other)):
        expected = read.layers(hidden)[0, 2:5, 0]
        torch.testing.assert_close(values[0], expected, atol=1e-5, rtol=1e-5)


def test_a_head_starts_at_zero_and_computes_in_float32(policy: Any) -> None:
    head = SharedHead(policy.config.hidden_size)
    with autocast("bf16"):
        values = head(torch.randn(2, 4, policy.config.hidden_size, dtype=torch.bfloat16))
    assert values.dtype == torch.float32 and values.shape == (2, 4) and (values == 0).all()


def gradients(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def test_no_gradient_reaches_the_policy_from_the_loss_of_a_head(policy_folder: Path) -> None:
    policy = load_policy(policy_folder)
    networks = Networks(policy, shared(policy, 1), shared(policy, 2)).train()
    forward = networks(IDS, MASK, LENGTH)
    (forward.values.square().sum() + forward.cost_values.square().sum()).backward()
    assert gradients(policy) == 0
    assert gradients(networks.value) > 0 and gradients(networks.cost_value) > 0


def test_the_policy_s_gradient_is_the_same_with_heads_and_without(policy_folder: Path) -> None:
    seen: list[list[Tensor]] = []
    for heads in (0, 2):
        policy = load_policy(policy_folder)
        forward = Networks(policy, *(shared(policy, seed) for seed in range(heads)))(IDS, MASK, LENGTH)
        values = forward.values.square().sum() + forward.cost_values.square().sum() if heads else 0.0
        (forward.logprobs.sum() + values).backward()
        seen.append([p.grad for p in policy.parameters() if p.grad is not None])
    for plain, with_heads in zip(*seen, strict=True):
        torch.testing.assert_close(plain, with_heads)


@pytest.mark.parametrize(("algorithm", "critics"), [("ppo", 1), ("ppo_lag", 2), ("rloo", 0), ("dpo", 0)])
@pytest.mark.parametrize("share", [False, True])
def test_an_algorithm_gets_the_critics_it_trains(
    algorithm: str, critics: int, share: bool, policy_folder: Path, reward_folder: Path, cost_folder: Path
) -> None:
    given = RLSettings(algorithm={"name": algorithm}, share_backbone=share)  # type: ignore[arg-type]
    networks = build_networks(given, policy_folder, reward_folder, cost_folder)
    found = [critic for critic in (networks.value, networks.cost_value) if critic is not None]
    assert len(found) == critics
    assert all(isinstance(critic, SharedHead) is share for critic in found)


def test_rows_are_taken_some_at_a_time_without_a_gradient() -> None:
    sizes: list[int] = []

    def doubled(first: Tensor, second: Tensor) -> Tensor:
        sizes.append(len(first))
        return first * 2 + second

    weight = torch.ones(5, requires_grad=True)
    parts = [torch.tensor([3, 0]), torch.tensor([4, 2, 1])]
    results = in_parts(doubled, parts, weight, torch.arange(5.0))
    assert sizes == [2, 3] and results[0].tolist() == [5, 2] and not results[0].requires_grad
    assert in_order(parts, results).tolist() == [2, 3, 4, 5, 6]
