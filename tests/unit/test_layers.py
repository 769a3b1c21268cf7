"""Who may import whom, over the syntax tree of every file, imports inside functions included.

Levels: 0 settings, records, errors · 1 <step>/settings and rl/algorithm_settings · 2 every other shared file ·
3 the rest of a step's folder · 4 launch and __main__ · 5 component and <step>/component · 6 pipeline ·
7 conformance, which asks the steps' mathematics for its results and is itself asked by the command line alone. The
standard library is open.
A late import is one that importing the module does not run: inside a function, or for type checkers only.
"""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = {
    "demo", "preprocess", "base", "validate", "sft", "reward", "rl", "evaluate", "upload", "deploy", "infer", "notify",
}  # notify is no step, and its folder is one as theirs are
VOCABULARY = {f"components.{name}" for name in ("settings", "records", "errors")}
LAUNCHERS = {"components.launch", "components.__main__"}
LIGHT = (
    "artifacts", "champion", "launch", "mlflow_run", "mlflow_server", "outbox", "outputs", "parsing", "pipeline_run",
    "sources", "storage", "termination", "tracking", "trainjob", "webhook",
)
OPEN_TO_PIPELINE = VOCABULARY | {f"components.{name}" for name in LIGHT}
HEAVY = {
    "accelerate", "datasets", "deepspeed", "google.cloud", "matplotlib", "mlflow", "numpy", "pandas", "peft",
    "pyarrow", "tokenizers", "torch", "transformers",
}
NEVER_IN_PIPELINE = {"accelerate", "datasets", "deepspeed", "peft", "tokenizers", "torch", "transformers"}
RL_ORDER = ["types", "functional", "controllers", "algorithms", "loop", "step"]


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether it is late."""

    target: str
    line: int
    late: bool


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def place(module: str) -> tuple[int, str | None]:
    """The level of one of our modules, and the step whose folder it lies in."""
    parts = module.split(".")
    if parts[0] == "pipeline":
        return 6, None
    if module in VOCABULARY or module == "components":
        return 0, None
    if module in LAUNCHERS:
        return 4, None
    if module == "components.component":
        return 5, None
    if parts[1] == "conformance":
        return 7, None
    if parts[1] not in STEPS:
        return 2, None
    return {"settings": 1, "algorithm_settings": 1, "component": 5}.get(".".join(parts[2:]), 3), parts[1]


def is_heavy(target: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in HEAVY)


def late_nodes(tree: ast.Module) -> set[ast.AST]:
    late: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late.update(ast.walk(node))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            late.update(inner for statement in node.body for inner in ast.walk(statement))
    return late


def named_targets(node: ast.AST, path: str, known: set[str]) -> Iterator[str]:
    """The modules a node imports: `from a import b` is a.b where that is a module, else a."""
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            package = path.split("/")[: -node.level] if node.level else []
            source = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                yield name


def find_imports(path: str, source: str, known: set[str]) -> list[Import]:
    tree = ast.parse(source)
    late = late_nodes(tree)
    return [
        Import(target, getattr(node, "lineno", 0), node in late)
        for node in ast.walk(tree)
        for target in named_targets(node, path, known)
    ]


def outside_objection(module: str, imported: Import) -> str | None:
    """What is wrong with importing another distribution."""
    top = imported.target.split(".")[0]
    level = place(module)[0]
    if top in sys.stdlib_module_names:
        return None
    if level <= 1 and top != "pydantic":
        return "settings, records and errors import pydantic and nothing else"
    if level in (2, 3, 7) and top == "kfp":
        return "only components, the launcher and the pipeline know Kubeflow"
    if level == 5 and top != "kfp" and not imported.late:
        return "a component imports kfp and components.component, the rest inside its body"
    if level == 6 and top in NEVER_IN_PIPELINE:
        return "the pipeline never imports what trains"
    if (level == 6 or module in OPEN_TO_PIPELINE) and is_heavy(imported.target) and not imported.late:
        return "this module is loaded with the pipeline: import it inside the function that uses it"
    return None


def pipeline_objection(target: str, late: bool) -> str | None:
    level, _ = place(target)
    if level in (1, 5, 6) or target in OPEN_TO_PIPELINE:
        return None
    if target.startswith(("components.serving", "components.conformance")):
        return None if late else "the pipeline imports serving and conformance inside functions only"
    return "the pipeline imports a step's component and settings and light shared files only"


def rl_rank(module: str) -> int | None:
    parts = module.split(".")
    inside = parts[:2] == ["components", "rl"] and len(parts) > 2 and parts[2] in RL_ORDER
    return RL_ORDER.index(parts[2]) if inside else None


def inside_objection(module: str, imported: Import) -> str | None:
    """What is wrong with importing one of our own modules."""
    level, step = place(module)
    target_level, target_step = place(imported.target)
    own = target_step == step and step is not None
    if target_step and imported.target.endswith(".step"):
        return "a step's run is found by name at run time"
    if level == 6:
        return pipeline_objection(imported.target, imported.late)
    if level == 5:
        allowed = imported.late or imported.target == "components.component"
        return None if allowed else "a component imports components.component, the rest inside its body"
    if level == 3 and target_step and not own:
        return "steps never import steps"
    allowed_levels = {0: {0}, 1: {0}, 2: {0, 2}, 3: {0, 2}, 4: {0, 2, 4}, 7: {0, 1, 2, 3, 7}}
    if own:
        allowed_levels |= {1: {0, 1}, 3: {0, 1, 2, 3}}
    if target_level not in allowed_levels[level]:
        return f"level {level} does not import level {target_level}"
    rank, target_rank = rl_rank(module), rl_rank(imported.target)
    if rank is not None and target_rank is not None and target_rank > rank:
        return "in rl, types <- functional <- controllers <- algorithms <- loop <- step"
    return None


def objections(path: str, source: str, known: set[str]) -> list[str]:
    """Every import of a file that crosses a layer, one sentence each."""
    module, found = module_name(path), []
    for imported in find_imports(path, source, known):
        ours = imported.target.split(".")[0] in ("components", "pipeline")
        reason = (inside_objection if ours else outside_objection)(module, imported)
        if reason:
            found.append(f"{path}:{imported.line} imports {imported.target}: {reason}")
    return found


def source_files() -> list[str]:
    paths = [path for top in ("components", "pipeline") for path in (ROOT / top).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def all_imports() -> dict[str, list[Import]]:
    """What every module of the tree imports."""
    files = source_files()
    known = {module_name(path) for path in files}
    return {module_name(path): find_imports(path, (ROOT / path).read_text("utf-8"), known) for path in files}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    reached, waiting = set[str](), [start]
    while waiting:
        fresh = graph.get(waiting.pop(), set()) - reached
        reached |= fresh
        waiting += fresh
    return reached


def test_every_import_stays_within_its_layers() -> None:
    files = source_files()
    known = {module_name(path) for path in files}
    found = [line for path in files for line in objections(path, (ROOT / path).read_text("utf-8"), known)]
    assert len(files) >= 30
    assert not found, "\n".join(found)


def test_no_source_file_escapes_the_check() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", "components/*.py", "pipeline/*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path for path in listed if (ROOT / path).exists()} <= set(source_files())


def test_the_steps_are_the_folders_with_a_component() -> None:
    assert {path.parent.name for path in ROOT.glob("components/*/component.py")} == STEPS


def test_nothing_that_loads_with_the_pipeline_loads_what_is_heavy() -> None:
    early = {module: {i.target for i in found if not i.late} for module, found in all_imports().items()}
    heavy = {
        f"{module} -> {target}"
        for start in early
        if place(start)[0] in (1, 5, 6)
        for module in reachable(early, start) | {start}
        for target in early.get(module, set())
        if is_heavy(target)
    }
    assert not heavy


def test_rl_is_layered_through_files_outside_the_chain_too() -> None:
    assert not rl_climbs({module: {i.target for i in found} for module, found in all_imports().items()})


def rl_climbs(graph: dict[str, set[str]]) -> list[str]:
    """Where a lower file of the chain reaches a higher one by any path."""
    return [
        f"{start} reaches {end}"
        for start in graph
        if (rank := rl_rank(start)) is not None
        for end in sorted(reachable(graph, start))
        if (rl_rank(end) or 0) > rank
    ]


def test_a_climb_through_another_file_is_seen() -> None:
    names = {name: f"components.rl.{name}" for name in (*RL_ORDER, "rollout")}
    downhill = {names[high]: {names[low]} for low, high in pairwise(RL_ORDER)}
    assert not rl_climbs(downhill)
    detour = {**downhill, names["functional"]: {names["rollout"]}, names["rollout"]: {names["loop"]}}
    assert f"{names['functional']} reaches {names['loop']}" in rl_climbs(detour)


KNOWN = {
    "components.models", "components.sft.step", "components.sft.component", "components.rl.loop",
    "components.rl.algorithms.ppo",
}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("components/settings.py", "import yaml"),
        ("components/records.py", "from components import models"),
        ("components/sft/settings.py", "from components.models import load_policy"),
        ("components/sft/settings.py", "def f():\n    import torch"),
        ("components/models.py", "from components.sft.settings import SFTSettings"),
        ("components/generation/native.py", "import kfp"),
        ("components/artifacts.py", "import pandas"),
        ("components/sft/step.py", "def run():\n    from components.rl.loop import train"),
        ("components/sft/step.py", "from ..rl import loop"),
        ("components/sft/step.py", "import pipeline.settings"),
        ("components/evaluate/step.py", "import importlib\nimportlib.import_module('components.demo.judge')"),
        ("components/evaluate/step.py", "from components.evaluate.component import evaluate"),
        ("components/sft/report.py", "from components.sft.step import run"),
        ("components/launch.py", "from components.sft import step"),
        ("components/launch.py", "import torch"),
        ("components/sft/component.py", "from components.launch import launch"),
        ("components/sft/component.py", "import pydantic"),
        ("components/component.py", "import yaml"),
        ("pipeline/cli.py", "def f():\n    import torch"),
        ("pipeline/cli.py", "import mlflow"),
        ("pipeline/dag.py", "from components.sft import step"),
        ("pipeline/dag.py", "from components.models import load_policy"),
        ("pipeline/cli.py", "from components.serving import app"),
        ("pipeline/cli.py", "from components.conformance import report"),
        ("components/rl/loop.py", "from components.conformance.reference import estimates"),
        ("components/models.py", "def f():\n    from components.conformance import check"),
        ("components/conformance/ours.py", "from components.sft import step"),
        ("components/conformance/ours.py", "import kfp"),
        ("components/rl/types.py", "from components.rl.functional import gae"),
        ("components/rl/functional.py", "from .algorithms import ppo"),
        ("components/rl/algorithms/ppo.py", "from ..loop import train"),
    ],
)
def test_an_import_across_layers_is_objected_to(path: str, source: str) -> None:
    assert len(objections(path, source, KNOWN)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("components/settings.py", "import json\nfrom pydantic import Field"),
        ("components/sft/settings.py", "from components.settings import StepSettings"),
        ("components/models.py", "import torch\nfrom components.artifacts import ModelCard"),
        ("components/artifacts.py", "def f():\n    import pyarrow"),
        ("components/storage/__init__.py", "import typing\nif typing.TYPE_CHECKING:\n    import pandas"),
        ("components/sft/step.py", "import torch\nfrom . import rows\nfrom components.sft.settings import A"),
        ("components/launch.py", "import importlib\nimportlib.import_module(f'components.{name}.step')"),
        ("components/sft/component.py", "import kfp\ndef sft():\n    from components.launch import launch"),
        ("pipeline/dag.py", "from components.sft import component"),
        ("pipeline/cli.py", "def serve():\n    from components.serving.app import build"),
        ("pipeline/cli.py", "def conformance():\n    from components.conformance.report import conform"),
        ("components/conformance/ours.py", "from components.rl.algorithms.ppo import PPO\nimport components.settings"),
        ("components/rl/algorithms/ppo_lag.py", "from . import ppo\nfrom ..types import Batch"),
        ("components/rl/loop.py", "from components.rl.algorithms import ppo"),
    ],
)
def test_an_import_within_layers_is_allowed(path: str, source: str) -> None:
    assert objections(path, source, KNOWN) == []


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = "import json, sys, pipeline.cli; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "mlflow", "pandas"}
