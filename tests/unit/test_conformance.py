"""The golden vectors: independent of our code, reproducible, and able to tell a mistake in every function."""

import ast
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from components.conformance import ours
from components.conformance.check import TOLERANCES, Outcome, check_vector, check_vectors, largest_error, load_library
from components.conformance.reference import complex_step, estimates, losses
from components.conformance.reference.__main__ import TOPICS, golden_vectors
from components.conformance.report import conform
from components.conformance.vectors import GOLDEN_DIR, Vector, read_vectors, write_vectors
from components.errors import InputError
from pipeline.cli import app, main

ROOT = Path(__file__).parents[2]
VECTORS = read_vectors()
FUNCTIONS = sorted({vector.function for vector in VECTORS})
LOSSES = [vector for vector in VECTORS if vector.gradients]
REFERENCE = ROOT / "components" / "conformance" / "reference"


def named(name: str) -> Vector:
    return next(vector for vector in VECTORS if vector.name == name)


def library(**functions: Any) -> ModuleType:
    """A module with some functions."""
    module = ModuleType("theirs")
    vars(module).update(functions)
    return module


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from flat(part)
    else:
        yield value


# --- the vectors themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", TOPICS)
def test_the_reference_gives_the_committed_vectors_again(topic: str, tmp_path: Path) -> None:
    write_vectors(tmp_path / f"{topic}.json", golden_vectors(topic))
    made, committed = (
        json.loads((folder / f"{topic}.json").read_text("utf-8")) for folder in (tmp_path, GOLDEN_DIR)
    )
    for mine, theirs in zip(made, committed, strict=True):
        for key in ("expected", "gradients"):  # a libm of another machine may round the last digit otherwise
            again, before = (row.pop(key) for row in (mine, theirs))
            parts = [list(flat(list(part.values()) if key == "gradients" else part)) for part in (again, before)]
            assert parts[0] == pytest.approx(parts[1], rel=1e-12, abs=1e-15)
        assert mine == theirs


def test_every_topic_has_its_file_and_every_name_is_used_once() -> None:
    assert {path.stem for path in GOLDEN_DIR.iterdir()} == set(TOPICS)
    assert len({vector.name for vector in VECTORS}) == len(VECTORS) >= 79
    assert len(FUNCTIONS) == 20


def test_the_vectors_are_strict_json_and_read_back_as_they_were() -> None:
    for path in GOLDEN_DIR.iterdir():
        json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    padding = named("masked_mean/not-finite-padding").inputs["values"]
    assert {str(value) for value in flat(padding) if not math.isfinite(value)} == {"nan", "inf", "-inf"}
    assert named("policy_loss/token").inputs["clip_high"] is None
    assert named("policy_loss/token").inputs["normalization"] == "token"


def test_the_vectors_are_as_nasty_as_they_claim() -> None:
    lengths = {sum(row) for vector in VECTORS for row in vector.inputs.get("mask", [])}
    assert min(lengths) == 1 and max(lengths) == 6
    for vector in VECTORS:
        mask = vector.inputs.get("mask")
        if vector.name.endswith("not-finite-padding"):
            assert any(isinstance(v, float) and math.isnan(v) for v in flat(list(vector.inputs.values())))
        if mask:  # rubbish wherever there is an outside
            tensors = [v for v in vector.inputs.values() if isinstance(v, list) and isinstance(v[0], list)]
            tokens = [zip(flat(rows), flat(mask), strict=True) for rows in tensors if rows is not mask]
            outside = [value for pairs in tokens for value, inside in pairs if not inside]
            assert outside and all(not math.isfinite(v) or abs(v) > 100 for v in outside), vector.name


def test_clipping_decides_in_the_clipped_vectors_and_the_clamp_in_the_clamped() -> None:
    near = named("policy_loss/token")
    tokens = zip(flat(near.gradients["logprobs"]), flat(near.inputs["mask"]), strict=True)
    still = [slope == 0 for slope, inside in tokens if inside]
    assert 0 < sum(still) < len(still)
    far = named("policy_loss/clamped")
    assert math.log(abs(far.expected[0])) > 15
    assert max(map(abs, flat(named("kl_estimate/k1-clamped").expected))) == 20


def test_the_reference_shares_no_code_and_no_library_with_what_it_checks() -> None:
    allowed = ("components.conformance.reference", "components.conformance.vectors")
    paths = sorted(REFERENCE.glob("*.py"))
    assert len(paths) >= 6
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.startswith(allowed) or name.split(".")[0] in sys.stdlib_module_names, f"{path.name}: {name}"


# --- the reference against itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", LOSSES, ids=lambda vector: vector.name)
def test_golden_gradients_are_the_slopes_of_the_golden_losses(vector: Vector) -> None:
    compute = getattr(losses, vector.function)
    for name, gradient in vector.gradients.items():
        slopes = list(flat(central_differences(compute, vector.inputs, name)))
        size = max(1.0, abs(vector.expected[0]))
        assert slopes == pytest.approx(list(flat(gradient)), abs=2e-7 * size)


def central_differences(compute: Callable[..., complex], inputs: dict[str, Any], name: str, step: float = 1e-6) -> Any:
    def slope(function: Callable[[Any], complex], value: Any) -> Any:
        if not isinstance(value, list):
            return (function(value + step) - function(value - step)).real / (2 * step)
        return [
            slope(lambda part, at=at: function([*value[:at], part, *value[at + 1 :]]), number)  # type: ignore[misc]
            for at, number in enumerate(value)
        ]

    return slope(lambda changed: compute(**{**inputs, name: changed}), inputs[name])


def test_the_complex_step_is_exact() -> None:
    slope = complex_step.gradient(lambda x: complex_step.exp(x[0]) * x[1], {"x": [1.5, -2.0]}, "x")
    assert slope == pytest.approx([-2 * math.exp(1.5), math.exp(1.5)], rel=1e-15)
    for x in (-800.0, -3.0, 0.0, 3.0, 800.0):
        expected = 1 / (1 + math.exp(x)) if x < 700 else 0.0
        assert complex_step.gradient(lambda x: complex_step.log_sigmoid(x), {"x": x}, "x") == pytest.approx(expected)
    assert complex_step.gradient(lambda x: complex_step.clamp(x, -1, 1), {"x": 3.0}, "x") == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_n_gains_with_n_and_strays_no_further_than_the_bound(seed: int) -> None:
    draw = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities, scores = (draw[0] / draw[0].sum()).tolist(), draw[1].tolist()
    found = [estimates.best_of_n(probabilities, scores, n) for n in range(1, 12)]
    best, divergence = zip(*found, strict=True)
    assert best[0] == pytest.approx(sum(p * s for p, s in zip(probabilities, scores, strict=True)))
    assert divergence[0] == pytest.approx(0, abs=1e-12)
    assert list(best) == sorted(best) and best[-1] <= max(scores)
    assert all(kl <= math.log(n) - (n - 1) / n + 1e-12 for n, kl in enumerate(divergence, start=1))


def test_the_bound_on_best_of_n_is_reached_where_no_outcome_is_likely() -> None:
    _, divergence = estimates.best_of_n([1e-3] * 1000, list(range(1000)), 4)
    assert divergence == pytest.approx(math.log(4) - 3 / 4, abs=1e-3)


# --- our functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_our_functions_pass_every_vector(dtype: Any) -> None:
    console = Console(width=100, record=True, quiet=True)
    assert conform("ours", dtype, console)
    outcomes = check_vectors(ours, VECTORS, getattr(torch, dtype))
    assert [outcome.status for outcome in outcomes] == ["pass"] * len(VECTORS)


def test_our_functions_take_what_the_vectors_give() -> None:
    for vector in VECTORS:
        assert list(inspect.signature(getattr(ours, vector.function)).parameters) == list(vector.inputs), vector.name


def interleaved(rewards: Tensor, group_size: int) -> Tensor:
    """Rows of a group taken for far apart, when they are neighbours."""
    order = torch.arange(len(rewards)).view(group_size, -1).T.flatten()
    return ours.leave_one_out(rewards=rewards[order], group_size=group_size)[order.argsort()]


def mean_of_row_means(values: Tensor, mask: Tensor) -> Tensor:
    clean = values.masked_fill(~mask, 0.0)
    return (clean.sum(1) / mask.sum(1)).mean()


MISTAKES: dict[str, Callable[..., Any]] = {
    "best_of_n": lambda **k: ours.best_of_n(**{**k, "n": k["n"] + 1}),
    "cost_loss": lambda **k: ours.cost_loss(**{**k, "chosen_sign": -k["chosen_sign"]}),
    "eos_rule": lambda **k: ours.eos_rule(**{**k, "ended": ~k["ended"]}),
    "gae": lambda **k: ours.gae(**{**k, "mask": torch.ones_like(k["mask"])}),
    "group_advantages": lambda rewards, group_size, scale, eps: ours.group_advantages(
        rewards=rewards, group_size=group_size, scale=scale, eps=0.01
    ),
    "grpo_loss": lambda **k: ours.grpo_loss(**{**k, "kl_coef": 2 * k["kl_coef"]}),
    "kl_estimate": lambda **k: ours.kl_estimate(
        logprobs=k["ref_logprobs"], ref_logprobs=k["logprobs"], estimator=k["estimator"]
    ),
    "learning_rate": lambda **k: ours.learning_rate(**{**k, "updates": k["updates"] + 1}),
    "leave_one_out": interleaved,
    "log_lambda_step": lambda **k: k["log_lambda"] + k["lr"] * (k["cost"] - k["limit"]),
    "masked_mean": mean_of_row_means,
    "policy_loss": lambda **k: -ours.policy_loss(**{**k, "advantages": -k["advantages"]}),
    "ppo_lag_advantages": lambda **k: ours.ppo_lag_advantages(**{**k, "costs": -k["costs"]}),
    "preference_loss": lambda **k: ours.preference_loss(**{**k, "ref_chosen_logprobs": 0 * k["chosen_logprobs"]}),
    "ranking_loss": lambda **k: ours.ranking_loss(chosen=k["rejected"], rejected=k["chosen"]),
    "rloo_advantages": lambda **k: ours.rloo_advantages(**{**k, "kl_coef": k["kl_coef"] / 2}),
    "sequence_policy_loss": lambda **k: ours.sequence_policy_loss(**{**k, "clip": 0.3}),
    "token_rewards": lambda **k: ours.token_rewards(**{**k, "mask": torch.ones_like(k["mask"])}),
    "value_loss": lambda **k: ours.value_loss(**{**k, "clip": 5.0}),
    "whiten": lambda **k: ours.whiten(**{**k, "shift_mean": not k["shift_mean"]}),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mistake_in_any_function_is_seen_by_its_numbers(function: str) -> None:
    outcomes = check_vectors(library(**{function: MISTAKES[function]}), VECTORS, torch.float64)
    assert "is off" in {outcome.reason[-6:] for outcome in outcomes if outcome.status == "FAIL"}
    assert not [outcome.reason for outcome in outcomes if "Error" in outcome.reason]


def detached(**inputs: Any) -> Tensor:
    return ours.policy_loss(**inputs).detach()


def misdirected(**inputs: Any) -> Tensor:
    """The right value, its gradient through the wrong tensor's sign."""
    loss = ours.policy_loss(**inputs)
    return 2 * loss.detach() - loss


@pytest.mark.parametrize("broken", [detached, misdirected])
def test_a_wrong_gradient_of_a_right_value_is_seen(broken: Callable[..., Tensor]) -> None:
    assert check_vector(broken, named("policy_loss/token"), torch.float64).status == "FAIL"


def test_a_gradient_that_is_nan_in_the_padding_is_seen() -> None:
    def leaking(**k: Any) -> Tensor:
        ratio = (k["logprobs"] - k["old_logprobs"]).exp() * k["advantages"]
        return -torch.where(k["mask"], ratio, 0.0).sum() / k["mask"].sum()

    vector = named("policy_loss/not-finite-padding")
    outcome = check_vector(leaking, vector, torch.float64)
    assert outcome.status == "FAIL" and outcome.error == math.inf


# --- checking --------------------------------------------------------------------------------------------------------


def test_a_library_may_lack_functions_and_variants_and_differ_on_purpose() -> None:
    def no_k2(*, logprobs: Tensor, ref_logprobs: Tensor, estimator: Any) -> Tensor:
        if estimator == "k2":
            raise NotImplementedError("no k2 here")
        return ours.kl_estimate(logprobs=logprobs, ref_logprobs=ref_logprobs, estimator=estimator)

    theirs = library(
        kl_estimate=no_k2,
        masked_mean=mean_of_row_means,
        leave_one_out=ours.leave_one_out,
        gae=lambda **inputs: 1 / 0,
        DIFFERENCES={"masked_mean": "rows first", "leave_one_out/pairs": "not so", "gae": "no excuse for an exception"},
    )
    found = {outcome.vector.name: outcome for outcome in check_vectors(theirs, VECTORS, torch.float64)}
    assert (found["kl_estimate/k1"].status, found["kl_estimate/k2"].status) == ("pass", "not offered")
    assert found["kl_estimate/k2"].reason == "no k2 here" and not found["kl_estimate/k2"].absent
    assert (found["masked_mean/tokens"].status, found["masked_mean/tokens"].reason) == ("differs", "rows first")
    assert found["leave_one_out/pairs"].status == "pass"
    assert found["gae/gamma-0.9-lam-0.8"].status == "FAIL"
    assert found["gae/gamma-0.9-lam-0.8"].reason == "ZeroDivisionError: division by zero"
    assert found["whiten/shifted"].absent


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (lambda **k: ours.gae(**k)[0], "1 results; expected 2"),
        (lambda **k: tuple(part[:, :-1] for part in ours.gae(**k)), "result is off"),
        (lambda **k: (ours.gae(**k)[0], ours.gae(**k)[0]), "result is off"),
        (lambda **k: (ours.gae(**k)[0] * math.nan, ours.gae(**k)[1]), "result is off"),
    ],
)
def test_a_result_of_another_form_fails(result: Callable[..., Any], reason: str) -> None:
    outcome = check_vector(result, named("gae/gamma-0.9-lam-0.8"), torch.float64)
    assert (outcome.status, outcome.reason) == ("FAIL", reason)


def test_the_error_is_a_share_above_one_and_an_amount_below() -> None:
    mask = torch.tensor([True, True, False])
    assert largest_error(torch.tensor([200.0, 0.5]), [100.0, 0.25], None) == 1.0
    assert largest_error(torch.tensor([0.5, 0.0]), [0.25, 0.0], None) == 0.25
    assert largest_error(torch.tensor([1.0, 2.0, math.nan]), [1.0, 2.0, 7.0], mask) == 0
    assert largest_error(torch.tensor([1.0, 2.0, math.nan]), [1.0, 2.0, 7.0], None) == math.inf
    assert largest_error(1.0 + 2**-40, 1.0, None) == 2**-40  # numbers keep their precision


def test_a_library_that_cannot_be_used_is_a_mistake_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_written.py").write_text("def gae(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"--against is 'no_such.module', which cannot be imported: ModuleNotFound"):
        load_library("no_such.module")
    with pytest.raises(InputError, match=r"--against is 'half_written', which cannot be imported: SyntaxError"):
        load_library("half_written")
    with pytest.raises(InputError, match=r"--against: json has none of the functions best_of_n, .* --functions"):
        check_vectors(json, VECTORS, torch.float64)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"gae/gama": "a slip"}, "theirs.DIFFERENCES names 'gae/gama', which is no vector"),
        (["gae"], r"theirs.DIFFERENCES is \['gae'\]; accepted: vector names to reasons"),
        ({"gae": None}, "theirs.DIFFERENCES is {'gae': None}; accepted"),
    ],
)
def test_an_excuse_for_nothing_is_refused(declared: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_vectors(library(gae=ours.gae, DIFFERENCES=declared), VECTORS, torch.float64)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def module_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path, as a person's own trainer would be."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def conformance(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["conformance", *arguments], env={"COLUMNS": "140"})
    return result.exit_code, result.output


def test_the_command_fails_a_broken_module_and_passes_a_sound_one(module_folder: Path) -> None:
    sound = "def leave_one_out(*, rewards, group_size):\n    g = rewards.view(-1, group_size)\n"
    right = "    return (g - (g.sum(1, keepdim=True) - g) / (group_size - 1)).flatten()\n"
    (module_folder / "sound_trainer.py").write_text(sound + right)
    (module_folder / "broken_trainer.py").write_text(sound + right.replace("group_size - 1", "group_size"))
    code, shown = conformance("--against", "sound_trainer")
    assert code == 0 and "3 pass, 0 fail, 0 differ on purpose, 76 not offered" in shown
    code, shown = conformance("--against", "broken_trainer", "--dtype", "float32")
    assert code == 1 and "FAIL: result is off" in shown and "0 pass, 3 fail" in shown


def test_the_command_prints_what_may_be_offered() -> None:
    code, shown = conformance("--functions")
    assert code == 0
    assert [line.partition("(")[0] for line in shown.splitlines() if not line.startswith(" ")] == list(
        dict.fromkeys(vector.function for vector in VECTORS)
    )
    assert "leave_one_out(*, rewards: Tensor, group_size: int) -> Tensor" in shown


def test_a_module_that_is_not_there_is_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plumbline", "conformance", "--against", "nowhere"])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert (left.value.code, shown.out) == (2, "")
    assert shown.err.startswith("error: --against is 'nowhere', which cannot be imported")
    assert len(shown.err.splitlines()) == 1


def test_tolerances_tell_epsilons_of_other_libraries_apart() -> None:
    def coarse(*, values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
        inside = values[mask]
        return (values - inside.mean()) / (inside.std(unbiased=False) + 1e-4) + (0 if shift_mean else inside.mean())

    assert TOLERANCES[torch.float64] < TOLERANCES[torch.float32]
    outcomes = [check_vector(coarse, named(f"whiten/{variant}"), torch.float64) for variant in ("shifted", "unshifted")]
    assert [outcome.status for outcome in outcomes] == ["FAIL", "FAIL"]
    assert all(isinstance(outcome, Outcome) and outcome.error < 1e-3 for outcome in outcomes)
