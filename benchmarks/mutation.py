"""How many small mistakes in the mathematics the tests notice: a mutation test of the algorithms.

Every mutant is planted into the loaded modules of a forked process, which then runs the tests of its file and stops
at the first that fails. Tests that train (the bandit's) are left out: arithmetic has to be pinned by numbers.
`make mutation` takes some minutes; ARGS="components/rl/controllers.py --workers 2" looks at one file.
"""

import argparse
import gc
import inspect
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from mutants import Mutant, mutants

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 30.0
SLOW_PLUGINS = ("cacheprovider", "unraisableexception", "threadexception")  # the last two collect garbage at the end
NOT_PLANTED = 70
"""The exit code of a process that could not plant its mutant, which is a mistake of this file."""
ALGORITHMS = ("ppo", "ppo_lag", "rloo", "grpo", "online_dpo", "best_of_k", "dpo")
TESTS = {
    "components/divergence.py": ["tests/unit/test_functional.py"],
    "components/rl/functional.py": ["tests/unit/test_functional.py"],
    "components/rl/controllers.py": ["tests/unit/test_controllers.py"],
    **{f"components/rl/algorithms/{name}.py": [f"tests/unit/test_{name}.py"] for name in ALGORITHMS},
    "components/reward/pairs.py": ["tests/unit/test_reward_pairs.py"],
}
FUNCTIONAL, PAIRS = "components/rl/functional.py", "components/reward/pairs.py"
PPO, ONLINE_DPO = "components/rl/algorithms/ppo.py", "components/rl/algorithms/online_dpo.py"
SQUARED = "it is squared, which forgets the sign"
FILLED = "what is filled in lies outside the mask, and the mask is applied once more before anything is summed"
NUMBER = "only its number is taken, with a gradient or without"
EQUIVALENT: dict[tuple[str, str, str], tuple[int, str]] = {
    (FUNCTIONAL, "whiten", "values - mean -> mean - values"): (1, SQUARED),
    (FUNCTIONAL, "group_advantages", "rewards - sums[1] / sums[0] -> sums[1] / sums[0] - rewards"): (1, SQUARED),
    (FUNCTIONAL, "clipped_value_loss", "values - returns -> returns - values"): (1, SQUARED),
    (FUNCTIONAL, "clipped_value_loss", "bounded - returns -> returns - bounded"): (1, SQUARED),
    (FUNCTIONAL, "preference_loss", "difference - 1 / (2 * beta) -> 1 / (2 * beta) - difference"): (1, SQUARED),
    (PPO, "critic_metrics", "returns - values -> values - returns"): (1, "a variance has no sign"),
    (FUNCTIONAL, "gae", "0.0 -> 1.0"): (1, "of the rewards, " + FILLED),
    (FUNCTIONAL, "clipped_policy_loss", "0.0 -> 1.0"): (1, FILLED),
    (FUNCTIONAL, "clipped_value_loss", "0.0 -> 1.0"): (1, FILLED),
    (FUNCTIONAL, "gae", "torch.zeros_like(rewards) -> torch.ones_like(rewards)"): (1, "every place is written to"),
    (FUNCTIONAL, "gae", "0 -> -1"): (2, "any column has the shape of a column"),
    (FUNCTIONAL, "clipped_policy_loss", "advantages < 0 -> advantages <= 0"): (1, "for 0 both bounds are 0"),
    (ONLINE_DPO, "targets", "groups.amax(1) > groups.amin(1) -> groups.amax(1) >= groups.amin(1)"):
        (1, "where all are equal the first is both, and same_response finds it the same"),
    (ONLINE_DPO, "targets", "same_response(rollout, chosen, rejected) -> same_response(rollout, rejected, chosen)"):
        (1, "it is symmetric"),
    (ONLINE_DPO, "same_response", "1 -> 2"): (1, "no token has the id -1, and none has -2"),
    **{
        (f"components/rl/algorithms/{name}.py", "loss", "forward.entropy.detach() -> forward.entropy"): (1, NUMBER)
        for name in ("ppo", "grpo", "best_of_k", "dpo")
    },
    (PAIRS, "loss", "(chosen - rejected).detach() -> chosen - rejected"): (1, NUMBER),
    (PAIRS, "loss", "(chosen - rejected).detach() * (1 if self.kind == 'reward' else -1) -> "
     "(chosen - rejected).detach() / (1 if self.kind == 'reward' else -1)"): (1, "times and over are one for 1 and -1"),
}  # fmt: skip
"""Mutants that no test can tell from the original, by file, function and change: how many, and why."""


class NoTraining:
    """Leaves out the tests that train a network."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the others."""
        items[:] = [item for item in items if "bandit" not in getattr(item, "fixturenames", ())]


@dataclass
class Tally:
    """What became of the mutants of a file."""

    killed: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many there were."""
        return self.killed + len(self.survivors)


def main() -> int:
    """Print killed and surviving mutants by file; the exit code is 1 below the share asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=list(TESTS), help="which of the files; all by default")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be killed")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed
    killed = total = 0
    for name in given.files:
        started = time.monotonic()
        tally = examine(name, given.workers)
        survived = len(tally.survivors)
        tally.survivors = without_equivalent(name, tally.survivors)
        killed, total = killed + tally.killed, total + tally.total
        told = f"{tally.killed}/{tally.total} killed, {survived - len(tally.survivors)} equivalent"
        print(f"{name}: {told}, in {time.monotonic() - started:.0f} s", flush=True)
        for mutant in tally.survivors:
            print(f"  {name}:{mutant.line}: {mutant.change}", flush=True)
    print(f"{killed}/{total} mutants killed: {killed / total:.1%}")
    return int(killed < given.least * total)


def examine(name: str, workers: int) -> Tally:
    """Run the tests of a file on all its mutants."""
    if run_tests(TESTS[name]):  # this also loads everything that the forked processes need
        raise SystemExit(f"{name}: its tests fail without a mutant; mend them first.")
    gc.freeze()  # the garbage collector need not look at what is there
    module, tally = import_module(name.removesuffix(".py").replace("/", ".")), Tally()
    same = Mutant(0, "", "nothing", compile(Path(name).read_text("utf-8"), name, "exec"))
    if not all(survived for _, survived in outcomes(module, iter([same]), TESTS[name], 1)):
        raise SystemExit(f"{name}: its tests fail once it is planted unchanged; this file is at fault.")
    for mutant, survived in outcomes(module, mutants(Path(name).read_text("utf-8"), name), TESTS[name], workers):
        if survived:
            tally.survivors.append(mutant)
        else:
            tally.killed += 1
    return tally


def without_equivalent(name: str, survivors: Sequence[Mutant]) -> list[Mutant]:
    """The survivors that a test could have killed. Stops at an entry of the list that is none any more."""
    left = list(survivors)
    for (file, function, change), (count, _) in EQUIVALENT.items():
        if file == name:
            alike = [mutant for mutant in left if (mutant.function, mutant.change) == (function, change)]
            if len(alike) < count:
                raise SystemExit(f"{file}, {function}: {change!r} is killed or gone; take it off the list.")
            left = [mutant for mutant in left if mutant not in alike[:count]]
    return left


def outcomes(
    module: ModuleType, waiting: Iterator[Mutant], tests: Sequence[str], workers: int
) -> Iterator[tuple[Mutant, bool]]:
    """Every mutant and whether the tests pass in spite of it; one that runs into the time limit does not."""
    running: dict[int, tuple[Mutant, float]] = {}
    while True:
        while len(running) < workers and (mutant := next(waiting, None)):
            running[start(module, mutant, tests)] = mutant, time.monotonic()
        if not running:
            return
        for process, (mutant, started) in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended and time.monotonic() - started > TIMEOUT_S:
                os.kill(process, signal.SIGKILL)
            if ended:
                del running[process]
                assert os.waitstatus_to_exitcode(status) != NOT_PLANTED, f"cannot plant {mutant}"
                yield mutant, status == 0
        time.sleep(0.002)


def start(module: ModuleType, mutant: Mutant, tests: Sequence[str]) -> int:
    """A forked process that runs the tests on the mutant and ends with 0 when they pass; its id."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:  # whatever the mutant makes of it, a child must never go on as its parent
        namespace = executed(module, mutant)
        code = NOT_PLANTED
        plant(module, namespace, mutant.code.co_filename)
        code = 1
        code = int(run_tests(tests))
    finally:
        os._exit(code)


def run_tests(tests: Sequence[str]) -> int:
    """Run some test files in this process, silently, up to the first failure; 0 when they pass."""
    null, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(null, number)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            options = ["-x", "-q", "--tb=no", f"--basetemp={scratch}/tests", *(f"-pno:{name}" for name in SLOW_PLUGINS)]
            return int(pytest.main([*options, *tests], plugins=[NoTraining()]))
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)


def executed(module: ModuleType, mutant: Mutant) -> dict[str, Any]:
    """What the mutant of a module defines."""
    namespace: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__}
    exec(mutant.code, namespace)
    return namespace


def plant(module: ModuleType, namespace: dict[str, Any], source: str) -> None:
    """Make the functions, methods and constants of a loaded module those of the namespace, wherever they are used.

    What was not compiled from `source` (methods of dataclasses, imports) stays.
    """
    for name, decorated in namespace.items():
        before: Any = vars(module).get(name)
        old, new = inspect.unwrap(before), inspect.unwrap(decorated)
        if isinstance(new, FunctionType) and new.__module__ == module.__name__:
            assert isinstance(old, FunctionType) and new.__code__.co_filename == source
            old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
        elif isinstance(new, type) and new.__module__ == module.__name__:
            assert isinstance(old, type)
            _plant_class(old, new, module, source)
        elif isinstance(new, str | int | float) and new != old:
            for other in [found for key, found in sys.modules.items() if key.startswith("components")]:
                if vars(other).get(name) is old:
                    setattr(other, name, new)


def _plant_class(old: type, new: type, module: ModuleType, source: str) -> None:
    """Give a class the methods and the plain attributes of another."""
    for name, value in vars(new).items():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(inner, FunctionType) and inner.__code__.co_filename == source:
            before = vars(old)[name]
            function: Any = before.fget if isinstance(before, property) else getattr(before, "__func__", before)
            closure = function.__closure__ if inner.__code__.co_freevars else None
            made = FunctionType(inner.__code__, vars(module), name, inner.__defaults__, closure)
            made.__kwdefaults__ = inner.__kwdefaults__
            setattr(old, name, made if inner is value else type(value)(made))
        elif isinstance(value, str | int | float) and not name.startswith("__"):
            setattr(old, name, value)


if __name__ == "__main__":
    raise SystemExit(main())
