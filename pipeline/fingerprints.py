"""What a task's result depends on besides settings and inputs: the code behind it and the files it names.

A fingerprint is a component's parameter, so Kubeflow's cache key contains it. The code is found by following
imports with `ast`, without importing anything.
"""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from components.artifacts import file_sha256, json_digest
from components.sources import sourced_fingerprint
from pipeline.settings import Settings

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "transformers")
STEP_OF_TASK = {"cost": "reward"}


def fingerprints(settings: Settings) -> dict[str, str]:
    """A digest for every task, of its code, the libraries and the files that its settings name.

    Raises InputError for a file or folder that is not there.
    """
    return {
        task: sourced_fingerprint(task, settings.step(task), code, demo=settings.demo is not None)
        for task, code in code_fingerprints(settings).items()
    }


def code_fingerprints(settings: Settings) -> dict[str, str]:
    """A digest for every task, of its code and the libraries alone: a cluster's run looks at its sources itself."""
    libraries = {name: _version(name) for name in LIBRARIES}
    digests = {}
    for task in settings.tasks():
        named = [file for name in _functions(settings, task) for file in _file_of(name)]
        files = code_files(STEP_OF_TASK.get(task, task), also=named)
        code = {_name(path): file_sha256(path) for path in files}
        digests[task] = json_digest({"code": code, "libraries": libraries})
    return digests


def code_files(step: str, root: Path = ROOT, also: Sequence[Path] = ()) -> list[Path]:
    """The files of a step's folder and `also`, and those of `components/` that they reach over imports, sorted."""
    folder = root / "components" / step
    reached: set[Path] = set()
    reached.update(folder.rglob("*.j2"))
    waiting = [*also, *(path for path in folder.rglob("*.py") if path.name != "component.py")]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting.extend(_imported(path, root))
    return sorted(reached)


def _functions(settings: Settings, task: str) -> list[str]:
    """The functions of a person's own that a task calls, as `module:function`."""
    if task == "evaluate":
        return [settings.evaluate.judge] if settings.evaluate.judge else []
    if task != "rl":
        return []
    scorers = (settings.rl.reward_scorer, settings.rl.cost_scorer)
    names = [scorer.name for scorer in scorers if scorer.kind == "function"]
    points = {point.name: point.value for point in entry_points(group="plumbline.scorers")}
    return [points.get(name, name) for name in names]


def _file_of(function: str) -> list[Path]:
    """The file of `module:function`; a name that leads nowhere is for the step to explain."""
    try:
        spec = find_spec(function.partition(":")[0])
    except (ImportError, ValueError):
        return []
    return [Path(spec.origin)] if spec and spec.origin and spec.origin.endswith(".py") else []


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """The files of `components/` that a file imports, anywhere in it."""
    for name in _names(path.read_text(encoding="utf-8")):
        yield from _files(name, root)


@cache
def _names(source: str) -> tuple[str, ...]:
    """The modules of `components` that a source imports; most sources are read for several tasks."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] == "components")


def _files(module: str, root: Path) -> Iterator[Path]:
    """The file of a module, and the `__init__` of a package."""
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            yield candidate


def _version(library: str) -> str | None:
    """The installed version; None without one, as where runs are only submitted."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None
