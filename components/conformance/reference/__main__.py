"""Write the golden vectors again: `python -m components.conformance.reference [FOLDER]`.

Every case goes through the plain-Python formulas beside this file; its gradients come from the complex step.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.conformance.reference import cases, estimates, loss_cases, losses
from components.conformance.reference.cases import Case
from components.conformance.reference.complex_step import gradient
from components.conformance.vectors import GOLDEN_DIR, Vector, write_vectors

TOPICS: dict[str, Callable[[], list[Case]]] = {
    "advantages": cases.group_advantages,
    "best_of_n": cases.best_of_n,
    "divergences": cases.divergences,
    "group_losses": loss_cases.group_losses,
    "lagrangian": cases.lagrangian,
    "means": cases.means,
    "policy_losses": loss_cases.policy_losses,
    "preference_losses": loss_cases.preference_losses,
    "rewards": cases.rewards,
    "schedules": cases.schedules,
    "score_losses": loss_cases.score_losses,
    "value_losses": loss_cases.value_losses,
}


def golden_vectors(topic: str) -> list[Vector]:
    """The vectors of a topic, computed now."""
    return [solved(case) for case in TOPICS[topic]()]


def solved(case: Case) -> Vector:
    """A case with its results and, where the case asks for them, derivatives."""
    function = case.name.partition("/")[0]
    compute = getattr(losses, function, None) or getattr(estimates, function)
    result: Any = compute(**case.inputs)
    expected = list(result) if isinstance(result, tuple) else [result]
    gradients = {name: gradient(compute, case.inputs, name) for name in case.by}
    return Vector(case.name, case.about, case.source, case.inputs, [_real(part) for part in expected], gradients)


def _real(value: Any) -> Any:
    return value.real if isinstance(value, complex) else value


def main(folder: Path) -> None:
    """Write every topic into the folder."""
    for topic in TOPICS:
        write_vectors(folder / f"{topic}.json", golden_vectors(topic))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN_DIR)
