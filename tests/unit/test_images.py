"""No image lacks a package: whatever its steps import, inside functions too, is among what it installs."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from components.launch import STEPS
from pipeline.fingerprints import ROOT, STEP_OF_TASK, code_files
from pipeline.resources import image_of
from pipeline.settings import TASKS, Settings

EXTRAS = {"pipeline": [], "train": ["train"], "serve": ["serve"]}
EXCEPTIONS = {
    ("pipeline", "components/tokens.py", "torch"): "pads batches; validate counts tokens and makes none",
    ("pipeline", "components/group.py", "torch"): "joins processes; the steps of this image have one",
    ("pipeline", "components/ranks.py", "torch"): "names a type",
    ("serve", "components/gathering.py", "deepspeed"): "gathers weights that lie in parts; those served are whole",
    ("serve", "components/zero.py", "deepspeed"): "divides weights that are trained",
    ("serve", "components/adapters.py", "peft"): "what is published has its adapters merged into the weights",
    ("serve", "components/models.py", "peft"): "puts adapters on a model that is trained",
}
UNSEEN = {
    "alembic": "mlflow-skinny's database needs it",
    "sqlalchemy": "mlflow-skinny's database needs it",
    "deepspeed": "accelerate imports it where the settings ask for it",
    "kfp-kubernetes": "kfp.kubernetes is a part of it",
    "docker": "is in its own extra",
}


def load_requirements() -> ModuleType:
    """containers/requirements.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "containers/requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def asked_for(image: str) -> frozenset[str]:
    """The distributions that an image names."""
    lines = load_requirements().requirements(ROOT / "pyproject.toml", EXTRAS[image])
    return frozenset(canonicalize_name(Requirement(line).name) for line in lines)


@cache
def installed(image: str) -> frozenset[str]:
    """The distributions that an image has: those it names and what they require in turn."""
    reached: set[str] = set()
    lines = load_requirements().requirements(ROOT / "pyproject.toml", EXTRAS[image])
    waiting = [(Requirement(line), "") for line in lines]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(line), wanted) for line in required_by(name)]
        reached.add(name)
    return frozenset(reached)


def required_by(name: str) -> list[str]:
    """What a distribution requires; nothing where it is not installed, as on another system."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def steps_of(image: str) -> set[str]:
    """The steps whose tasks run in an image; an exit handler is no task of the settings'."""
    names = Settings().images.model_dump()
    steps = {STEP_OF_TASK.get(task, task) for task in TASKS if image_of(Settings(), task) == names[image]}
    return steps | ({"notify"} & set(STEPS) if image == "pipeline" else set())


def files_of(image: str) -> list[Path]:
    """Our files that run in an image."""
    launcher = [ROOT / "components/launch.py"]
    folders = {"serving"} if image == "serve" else steps_of(image)
    files = {path for folder in folders for path in code_files(folder, also=launcher)}
    return sorted(path for path in files if path.suffix == ".py")


def third_party(path: Path) -> set[str]:
    """The modules of others that a file imports, anywhere in it, as far as they name a distribution."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    tops = {name if name.startswith("google.") else name.split(".")[0] for name in names}
    return {top for top in tops if top not in sys.stdlib_module_names and top not in ("components", "pipeline")}


@cache
def distributions_by_module() -> dict[str, list[str]]:
    return {module: list(names) for module, names in packages_distributions().items()}


def distributions(module: str) -> set[str]:
    """The distributions that may hold a module."""
    if module.startswith("google."):  # one name space, many distributions
        return {"google-" + "-".join(module.split(".")[1:3]), "google-api-core", "google-auth"}
    return {canonicalize_name(name) for name in distributions_by_module().get(module, [module])}


def lacking(image: str, paths: Iterable[Path]) -> list[str]:
    """Every import of these files that an image could not serve, one sentence each."""
    found = []
    for path in paths:
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        for module in sorted(third_party(path)):
            if not distributions(module) & installed(image) and (image, name, module) not in EXCEPTIONS:
                found.append(f"{image}: {name} imports {module}")
    return found


def test_every_task_has_an_image_and_every_step_runs_in_one() -> None:
    assert steps_of("pipeline") - {"notify"} == {"demo", "preprocess", "validate", "upload", "deploy"}
    assert steps_of("pipeline") | steps_of("train") == set(STEPS)


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_has_what_its_files_import(image: str) -> None:
    files = files_of(image)
    assert len(files) >= 20
    assert not lacking(image, files)


def test_the_command_line_needs_no_more_than_the_pipeline_image_has() -> None:
    containers = {ROOT / "pipeline/containers.py", ROOT / "pipeline/engine.py"}  # these need docker, in an extra
    assert not lacking("pipeline", sorted({*ROOT.glob("pipeline/*.py")} - containers))
    assert {line.split(" imports ")[1] for line in lacking("pipeline", sorted(containers))} == {"docker"}


def test_every_exception_is_still_one() -> None:
    for image, path, module in EXCEPTIONS:
        assert ROOT / path in files_of(image)
        assert module in third_party(ROOT / path)
        assert not distributions(module) & installed(image)


@pytest.mark.parametrize("source", ["import torch", "def f():\n    from torch.nn import Linear", "import trl"])
def test_a_package_that_an_image_lacks_is_seen(tmp_path: Path, source: str) -> None:
    (tmp_path / "step.py").write_text(f"import json\nimport pydantic\nfrom google.cloud import storage\n{source}\n")
    assert len(lacking("pipeline", [tmp_path / "step.py"])) == 1


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_names_nothing_that_it_does_not_use(image: str) -> None:
    files = {*files_of(image), *ROOT.glob("pipeline/*.py"), *ROOT.glob("components/*/component.py")}
    files |= set(files_of("pipeline")) | {ROOT / "components/serving/chat.py"}
    used = {name for path in files for module in third_party(path) for name in distributions(module)}
    assert not asked_for(image) - used - UNSEEN.keys()


def test_the_pipeline_image_installs_no_torch_and_each_other_does() -> None:
    assert {image: "torch" in installed(image) for image in EXTRAS} == {
        "pipeline": False, "train": True, "serve": True,
    }  # fmt: skip


def test_what_a_developer_installs_is_all_of_it() -> None:
    project = load_requirements()
    dev = " ".join(project.requirements(ROOT / "pyproject.toml", ["dev"]))
    (own,) = re.findall(r"plumbline\[([^]]*)\]", dev)
    assert {"train", "serve", "containers"} <= set(own.split(","))


@pytest.mark.parametrize("image", EXTRAS)
def test_a_dockerfile_installs_the_extras_of_its_image(image: str) -> None:
    text = (ROOT / f"containers/{image}.Dockerfile").read_text("utf-8")
    (line,) = re.findall(r"install.sh libraries(.*)", text)
    assert line.split() == EXTRAS[image]


def test_the_images_of_the_settings_are_those_that_are_built() -> None:
    version = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[0]
    settings = Settings()
    assert settings.images.model_dump() == {name: f"plumbline/{name}:{version}" for name in ("pipeline", "train")}
    assert settings.deploy.kserve.image == f"plumbline/serve:{version}"
