"""DeepSpeed's ZeRO against plain AdamW, step by step, in a group of one process: where it holds everything in one part.

What two processes make of it is in test_distributed.py. Here every number is compared: norms, clipping, moments, what a
skipped step leaves, and what a checkpoint of either brings back.
"""

import math
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.adapters import merged_tensors
from components.engines import Engine, Replica
from components.gathering import gathered, is_parted, shape_of
from components.models import load_policy, load_scalar, scalar_from_policy, with_lora
from components.optimizers import parameter_groups
from components.ranks import ALONE
from components.settings import Compute, Lora, Optimizer
from components.zero import Zero

pytestmark = pytest.mark.tried("ZeRO equals AdamW, step by step", against="DeepSpeed in one process, real; no GPU")

KINDS = ("zero1", "zero2", "zero3", "zero1-offload", "zero2-offload", "zero3-offload")
SETTINGS = {
    "": Optimizer(lr=1e-2, max_grad_norm=1e4, weight_decay=0.1),
    "value": Optimizer(lr=2e-2, max_grad_norm=2.0, betas=(0.8, 0.9)),
}
LIMITS = {network: settings.max_grad_norm for network, settings in SETTINGS.items()}
"""One network is never clipped, and the other always: a norm over both would show."""


class Networks(nn.Module):
    """Two networks with a loss each, and a buffer that belongs to the state."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.policy, self.value = nn.Linear(4, 7), nn.Linear(4, 3)
        self.register_buffer("seen", torch.tensor(float(seed)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x).sum(1), self.value(x).sum(1)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as probe, pytest.MonkeyPatch.context() as patch:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            patch.setenv(name, value)
        patch.setattr(Zero, "_refuse_the_whole", lambda self, trained: None)  # it is what is wanted here
        probe.close()
        dist.init_process_group("gloo")
        yield
        dist.destroy_process_group()


def engine(kind: str, seed: int = 0) -> Engine:
    model = Networks(seed)
    groups = parameter_groups(model, SETTINGS)
    if kind == "one":
        return Replica(model, model, groups, ALONE)
    strategy, _, offload = kind.partition("-")
    compute = Compute.model_construct(strategy=strategy, offload=bool(offload), dtype="fp32")  # type: ignore[arg-type]
    return Zero(model, groups, compute, ALONE)


def train(found: Engine, steps: range, skipped: int | None = None) -> list[dict[str, float]]:
    """The norms of some steps of three micro-batches each; one step may be skipped."""
    norms = list[dict[str, float]]()
    for step in steps:
        for micro in range(3):
            x = (step + 1) * torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + micro))
            policy, value = found.model(x)
            found.backward(policy.square().mean() + 3 * value.square().mean())

        def judge(seen: Mapping[str, float], step: int = step) -> bool:
            norms.append(dict(seen))
            return step != skipped

        found.step(judge, LIMITS)
    return norms


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].float(), other[name].float(), rtol=1e-4, atol=1e-6, msg=name)


def test_the_two_networks_are_clipped_differently() -> None:
    norms = train(engine("one"), range(3))
    assert all(row[""] < LIMITS[""] and row["value"] > LIMITS["value"] for row in norms)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_takes_the_steps_that_adamw_takes(kind: str) -> None:
    plain, divided = engine("one"), engine(kind)
    assert divided.shapes() == plain.shapes()
    assert_close(plain.state(), divided.state())  # before any step, without moments
    for expected, norms in zip(train(plain, range(4)), train(divided, range(4)), strict=True):
        assert norms == pytest.approx(expected, rel=1e-4)
    assert_close(plain.state(), divided.state())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_skipped_leaves_nothing_behind(kind: str) -> None:
    plain, divided = engine("one"), engine(kind)
    for found in (plain, divided):
        train(found, range(4), skipped=2)
    assert_close(plain.state(), divided.state())


@pytest.mark.parametrize("kind", KINDS)
def test_either_continues_from_the_other_s_checkpoint(kind: str) -> None:
    plain, divided = engine("one"), engine(kind)
    train(plain, range(2))
    train(divided, range(2))
    for begun, other in ((plain, engine(kind, seed=1)), (divided, engine("one", seed=1))):
        state: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in begun.state().items()}
        other.restore(state)
        assert_close(state, other.state())
        train(begun, range(2, 4))
        train(other, range(2, 4))
        assert_close(begun.state(), other.state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_whose_gradient_is_broken_are_named(kind: str) -> None:
    found = engine(kind)
    policy, value = found.model(torch.ones(2, 4))
    found.backward((policy.sum() * 1.0) + value.sum() * float("nan"))
    named = list[str]()

    def judge(norms: Mapping[str, float]) -> bool:
        named.extend(found.broken())
        return False

    found.step(judge, LIMITS)
    assert named == ["value.weight", "value.bias"]


def disturbed(model: Any) -> Any:
    """The model with adapters that change something: of a part of them all, where they lie in parts."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad(), gathered([parameter], changed=True):
                parameter.copy_(torch.randn(shape_of(parameter), generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapters"])
def test_a_policy_that_is_divided_as_it_comes_is_the_one_that_is_loaded_whole(policy_folder: Path, rank: int) -> None:
    found = dict[bool, Any]()
    for divide in (False, True):
        torch.manual_seed(5)
        model = load_policy(policy_folder, divide=divide)
        assert all(is_parted(parameter) == divide for parameter in model.parameters())
        model = disturbed(with_lora(model, Lora(rank=rank)))
        found[divide] = merged_tensors(model), torch.get_rng_state()
        assert all(is_parted(p) == divide for name, p in model.named_parameters() if "lora" not in name)
    (whole, drawn), (parted, its_drawn) = found.values()
    assert torch.equal(drawn, its_drawn)  # no random number more or less
    assert whole.keys() == parted.keys() and all(torch.equal(whole[name], parted[name]) for name in whole)


def test_the_head_of_a_divided_scalar_model_is_whole_and_zero(policy_folder: Path, reward_folder: Path) -> None:
    scalar = scalar_from_policy(policy_folder, divide=True)
    assert scalar.model.score.weight.shape == (1, 32) and not scalar.model.score.weight.any()
    assert is_parted(scalar.model.model.embed_tokens.weight)
    trained, whole = load_scalar(reward_folder, divide=True), load_scalar(reward_folder)
    assert (trained.mean, trained.std) == (whole.mean, whole.std) and is_parted(trained.model.model.norm.weight)
    assert torch.equal(trained.model.score.weight, whole.model.score.weight)


def test_vectors_of_divided_weights_do_not_decay_and_matrices_do(policy_folder: Path) -> None:
    sizes = [
        [sum(math.prod(shape_of(p)) for p in group["params"]) for group in parameter_groups(model, SETTINGS)]
        for model in (load_policy(policy_folder), load_policy(policy_folder, divide=True))
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2
