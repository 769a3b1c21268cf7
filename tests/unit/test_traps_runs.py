"""Traps of whole runs: stale rollouts, lost random states, counting, processes, secrets, devices, pins, dtypes."""

import ast
import importlib
import importlib.util
import logging
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from components import models, tracking
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.evaluate import contestants
from components.evaluate.settings import EvaluateSettings
from components.infer import step as infer
from components.infer.settings import InferSettings
from components.launch import run_step
from components.models import device, load_policy
from components.monitoring import Monitor
from components.rl.algorithm_settings import GRPOSettings, OnlineDPOSettings, PPOSettings, RLOOSettings
from components.rl.algorithms import build
from components.rl.assembly import Folders, build_networks
from components.rl.course import Course
from components.rl.loop import num_updates, train
from components.rl.networks import Networks
from components.rl.settings import RLSettings
from components.rl.sources import build_source
from components.rl.types import Batch, Source, State
from components.scoring import load_scorer
from components.serving.model import load_folder
from components.settings import Compute, Generation, Optimizer
from components.tokens import load_tokenizer
from components.updates import Updater

ROOT = Path(__file__).parents[2]
SOURCE = ("components", "pipeline")


class Run(NamedTuple):
    """The parts of a run."""

    settings: RLSettings
    networks: Networks
    algorithm: Any
    source: Source

    def train(self, folder: Path, source: Source) -> Course:
        """Three batches, each of one update that moves the policy far."""
        settings = self.settings
        updates = num_updates(settings, 3, source.rows_per_batch)
        updater = Updater(self.networks, settings.optimizer, settings.compute, updates)
        return train(settings, 3, self.algorithm, source, updater, [], Monitor([]), Checkpoints(folder, 0))


@pytest.fixture
def run_of(data_folder: Path, policy_folder: Path, reward_folder: Path) -> Callable[..., Run]:
    def made(algorithm: Any, **fields: Any) -> Run:
        settings = RLSettings(
            **{
                "algorithm": algorithm,
                "prompts_per_rollout": 6,
                "minibatch_size": 64,
                "generation": Generation(max_new_tokens=5, max_prompt_tokens=24),
                "optimizer": Optimizer(lr=0.01, schedule="constant", warmup=0.0),
                "compute": Compute(dtype="fp32"),
                **fields,
            }
        )
        networks = build_networks(settings, policy_folder, reward_folder, None)
        learner = build(settings.algorithm, lambda tensor: tensor, 5)
        tokenizer = load_tokenizer(policy_folder)
        folders = Folders(data_folder, policy_folder, reward_folder, None)
        source, _ = build_source(settings, learner, networks, tokenizer, folders)
        return Run(settings, networks, learner, source)

    return made


class Stale:
    """A source that hands every batch out one update late, as one does that samples ahead."""

    def __init__(self, source: Source) -> None:
        self.source, self.rows_per_batch = source, source.rows_per_batch
        self.ahead: list[Batch] = []

    def batch(self, number: int) -> Batch:
        """The batch before, sampled from weights that are gone."""
        self.ahead = self.ahead or [self.source.batch(0)]
        late = self.ahead.pop()
        self.ahead.append(self.source.batch(number + 1))
        return late

    def state(self) -> State:
        """As the source's."""
        return self.source.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """As the source's."""
        self.source.restore(tensors)


def gaps(course: Course) -> list[float]:
    return [row.metrics["policy/first_ratio_gap"] for row in course.history]


def test_every_rollout_is_of_the_weights_that_learn_from_it_and_a_stale_one_shows(
    run_of: Any, tmp_path: Path
) -> None:
    run = run_of(RLOOSettings(), epochs=2)
    assert max(gaps(run.train(tmp_path, run.source))) < 1e-4
    run = run_of(RLOOSettings(), epochs=2)
    first, *stale = gaps(run.train(tmp_path, Stale(run.source)))
    assert first < 1e-4 and min(stale) > 0.01


def test_a_batch_is_a_copy_that_later_updates_do_not_reach(run_of: Any) -> None:
    run = run_of(PPOSettings())
    batch = run.source.batch(0)
    kept = {name: tensor.clone() for name, tensor in batch.tensors().items()}
    with torch.no_grad():
        for parameter in run.networks.parameters():
            parameter.add_(1.0)
    for name, tensor in batch.tensors().items():
        assert torch.equal(tensor, kept[name]) and not tensor.requires_grad, name
    shared = {parameter.data_ptr() for parameter in run.networks.parameters()}
    assert not {tensor.data_ptr() for tensor in batch.tensors().values()} & shared


def test_the_draws_and_the_place_in_the_data_go_on_where_they_stopped(run_of: Any) -> None:
    whole, resumed, careless = (run_of(RLOOSettings()).source for _ in range(3))
    whole.batch(0)
    resumed.restore(whole.state()())
    expected = whole.batch(1)
    assert torch.equal(resumed.batch(1).input_ids, expected.input_ids)
    lost = careless.batch(1)  # the place in the data is the number; the draws would start over
    width = expected.input_ids.shape[1] - expected.mask.shape[1]
    assert torch.equal(lost.input_ids[:, :width], expected.input_ids[:, :width])
    assert not torch.equal(lost.input_ids, expected.input_ids)


@pytest.mark.parametrize("algorithm", [PPOSettings(), GRPOSettings(group_size=3), OnlineDPOSettings(group_size=3)])
def test_what_is_sampled_is_counted_in_responses_and_tokens_whatever_the_algorithm(
    algorithm: Any, run_of: Any
) -> None:
    run = run_of(algorithm)
    metrics = run.source.batch(0).metrics
    group_size = getattr(algorithm, "group_size", 1)
    assert metrics["rollout/samples"] == 6 * group_size  # and not the six prompts
    assert metrics["rollout/tokens"] == pytest.approx(metrics["rollout/length"] * 6 * group_size)


def test_processes_that_nobody_counted_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Started by hand in two processes, both would learn from the same rows."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"sft: 2 processes were started, and its compute settings ask for 1"):
        run_step("sft", {}, {}, metrics_file=tmp_path / "metrics.json", task="sft")


SECRETS = {
    "HF_TOKEN": "hf_planted1",
    "AWS_SECRET_ACCESS_KEY": "planted2",
    "MLFLOW_TRACKING_PASSWORD": "planted3",
    "MY_PASSWORD": "planted4",
}


class Told:
    """An MLflow run that keeps all it is told."""

    run_id = "1"

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.heard.append(repr((name, args)))


def test_nothing_of_the_environment_is_logged_tracked_or_written(
    data_folder: Path,
    policy_folder: Path,
    quick_training: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    told = Told()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    monkeypatch.setattr(tracking, "_step_run", lambda *_: told)
    settings = {"training": quick_training(checkpoint_every=1).model_dump(mode="json")}
    paths = {"data": data_folder, "base": policy_folder, "model": tmp_path / "model"}
    with caplog.at_level(logging.DEBUG):
        run_step("sft", settings, paths, metrics_file=tmp_path / "metrics", task="sft")
    printed = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode("latin-1")
    for text in (caplog.text, printed.out + printed.err, "".join(told.heard), written):
        assert not [value for value in SECRETS.values() if value in text]
    # All four places were told something.
    assert "'max_length': 64" in "".join(told.heard) and "loss/train" in written
    assert "24 demonstrations" in caplog.text and printed.out + printed.err


def whole_environments(source: str) -> list[str]:
    """The places where the environment is used as a whole, and not one variable or for a child process."""
    tree = ast.parse(source)
    allowed: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=inner, attr="get" | "setdefault" | "pop" | "update" | "keys"):
                allowed.add(id(inner))
            case ast.Subscript(value=inner) | ast.Compare(comparators=[inner]):
                allowed.add(id(inner))
            case ast.keyword(arg="env", value=ast.Dict(keys=keys, values=values)):
                allowed |= {id(value) for key, value in zip(keys, values, strict=True) if key is None}
    return [f"line {node.lineno}" for node in ast.walk(tree) if is_environment(node) and id(node) not in allowed]


def is_environment(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def sources() -> dict[str, str]:
    """Every source file's text by name."""
    paths = sorted(path for folder in SOURCE for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def test_the_environment_is_read_by_name_and_never_as_a_whole() -> None:
    found = {name: whole_environments(text) for name, text in sources().items()}
    assert len(found) > 100
    assert not {name: places for name, places in found.items() if places}


@pytest.mark.parametrize(
    "planted",
    [
        "print(os.environ)",
        "settings = dict(os.environ)",
        "json.dumps({**os.environ})",
        "for name, value in os.environ.items(): log(name, value)",
        "from os import environ\nlogger.info(environ)",
        "vars(args) | os.environ",
    ],
)
def test_a_dump_of_the_environment_is_seen(planted: str) -> None:
    assert whole_environments(planted)
    assert not whole_environments("os.environ.get('A'); os.environ['B']; 'C' in os.environ; run(env={**os.environ})")


def test_models_go_to_the_process_s_own_device_and_nowhere_else(
    policy_folder: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models, "device", lambda: torch.device("meta"))
        loaded = (load_policy(policy_folder), load_scorer(reward_folder).model)
        assert {p.device.type for model in loaded for p in model.parameters()} == {"meta"}
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device() == torch.device("cuda", 3)


class Loaded(Exception):
    """A policy was about to be loaded, in this dtype."""


def loading(folder: Path, dtype: str = "fp32") -> Any:
    raise Loaded(dtype)


def dtype_of(load: Callable[[], Any]) -> str:
    with pytest.raises(Loaded) as raised:
        load()
    return str(raised.value)


@pytest.mark.parametrize(("gpu", "expected"), [(False, "fp32"), (True, "bf16")])
def test_a_policy_is_evaluated_in_the_dtype_it_is_served_in(
    gpu: bool, expected: str, data_folder: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for module in (contestants, infer, models):  # serving imports it when it loads
        monkeypatch.setattr(module, "load_policy", loading)
    release = SimpleNamespace(read=lambda path: None)

    @contextmanager
    def deployed(*_: Any) -> Iterator[tuple[Path, str]]:
        yield policy_folder, "digest"

    for name, value in (("Release", release), ("Deployment", release), ("_deployed", deployed)):
        monkeypatch.setattr(infer, name, value)
    tokenizer = load_tokenizer(policy_folder)
    seen = {
        "evaluate": dtype_of(lambda: contestants.observe(policy_folder, tokenizer, [], [], EvaluateSettings())),
        "infer": dtype_of(
            lambda: infer.run(
                InferSettings(limit=1),
                data=data_folder,
                release=tmp_path,
                deployment=tmp_path,
                reward=tmp_path,
                cost=None,
                responses=tmp_path,
            )
        ),
        "serve": dtype_of(lambda: load_folder(policy_folder)),
    }
    assert seen == dict.fromkeys(seen, expected)


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """The exact version of every distribution in constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line) for line in lines if line]
    assert all(found), "a line that pins nothing exactly"
    return {normal(match[1]): match[2] for match in found if match}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    stated = [*project["dependencies"], *(row for rows in project["optional-dependencies"].values() for row in rows)]
    requirements = [Requirement(row) for row in stated]
    exact = pins()
    assert len(requirements) >= 30
    ours = [row for row in requirements if row.name == project["name"]]
    assert [row.extras for row in ours] == [{"containers", "serve", "train"}]  # dev has what the images have
    requirements = [row for row in requirements if row not in ours]
    assert not [str(row) for row in requirements if not row.specifier]
    missing = [str(row) for row in requirements if normal(row.name) not in exact]
    assert not missing
    assert not [str(row) for row in requirements if exact[normal(row.name)] not in row.specifier]


def imported() -> dict[str, set[str]]:
    """Modules of other packages that the source imports anywhere, and the names it takes from each."""
    found: dict[str, set[str]] = {}
    for text in sources().values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found.setdefault(alias.name, set())
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    ours = {*sys.stdlib_module_names, *SOURCE}
    return {module: names for module, names in found.items() if module.partition(".")[0] not in ours}


def absent(module: str, names: set[str]) -> list[str]:
    """What cannot be imported from a module as it is installed."""
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return [module]
    return [f"{module}.{name}" for name in sorted(names) if not hasattr(loaded, name) and not _is_module(module, name)]


def _is_module(module: str, name: str) -> bool:
    try:
        return importlib.util.find_spec(f"{module}.{name}") is not None
    except ImportError:
        return False


def test_every_import_anywhere_in_the_source_exists_and_is_pinned() -> None:
    found, exact, owners = imported(), pins(), packages_distributions()
    assert {"torch", "transformers", "kfp.dsl", "peft"} <= set(found) and len(found) >= 30
    assert not [name for module, names in found.items() for name in absent(module, names)]
    tops = {module.partition(".")[0] for module in found}
    assert not [top for top in tops if not {normal(owner) for owner in owners[top]} & set(exact)]


def test_an_import_that_a_release_dropped_is_seen() -> None:
    assert absent("torch.gone", {"x"}) == ["torch.gone"]
    assert absent("torch.nn", {"Linear", "gone", "functional"}) == ["torch.nn.gone"]
