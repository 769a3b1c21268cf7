"""Tasks in containers, with a stand-in for the engine that runs a container's command as a process of this machine."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
from docker.errors import DockerException, ImageNotFound
from kfp import dsl
from kfp.dsl import Metrics, Output

from components.component import component
from components.errors import InputError
from pipeline import engine, local
from pipeline.containers import Containers, image_id, lines
from pipeline.local import Plan
from pipeline.mounts import Mount, mounts
from pipeline.observer import Start
from pipeline.promotion import anchored
from pipeline.screen import Screen
from pipeline.settings import Settings


class Container:
    """A container whose command is a process of this machine, started late and removed once."""

    def __init__(self, command: list[str], options: dict[str, Any]) -> None:
        self.command, self.options, self.events, self.log = command, options, list[str](), list[bytes]()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        python = Path(sys.executable).parent  # what an image has on its PATH
        environment = {**os.environ, "PATH": f"{python}:/usr/bin:/bin", **self.options["environment"]}
        self.process = subprocess.Popen(
            self.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def logs(self, stream: bool) -> Iterator[bytes]:
        assert stream
        assert self.process is not None
        assert isinstance(self.process.stdout, io.BufferedReader)
        yield from self.log  # whoever asks again is told everything again
        while piece := self.process.stdout.read1(7):
            self.log.append(piece)
            yield piece

    def wait(self) -> dict[str, int]:
        assert self.process is not None
        self.events.append("waited")
        return {"StatusCode": self.process.wait()}

    def kill(self, signal: str = "SIGKILL") -> None:
        assert self.process is not None
        self.events.append(signal)
        self.process.terminate()

    def exec_run(self, command: list[str]) -> None:
        self.events.append(" ".join(command))

    def remove(self, force: bool) -> None:
        self.events.append("removed")


class Engine:
    """The part of docker's client that is used."""

    def __init__(self) -> None:
        self.made: list[Container] = []
        self.containers = SimpleNamespace(create=self._create)
        self.images = SimpleNamespace(get=self._get)

    def _create(self, image: str, command: list[str], **options: Any) -> Container:
        self.made.append(Container(command, {"image": image, **options}))
        return self.made[-1]

    def _get(self, name: str) -> Any:
        if name == "localhost/plumbline/train:0.1.0":
            return SimpleNamespace(id="sha256:1234")
        raise ImageNotFound("no such image")

    def info(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(docker, "from_env", lambda: made)
    return made


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Containers:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getgid", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    images = {"demo": "sha256:aa", "sft": "sha256:bb"}
    return Containers(anchored(Settings()), tmp_path / "runs", images, "none")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def start(printed: list[str], **environment: str) -> Start:
    return Start("sft", environment, printed.append)


def test_a_container_gets_its_options_its_mounts_and_its_memory(
    runner: Containers, client: Engine, tmp_path: Path
) -> None:
    printed: list[str] = []
    kfps = {str(tmp_path / "runs/.artifacts"): {"bind": str(tmp_path / "runs/.artifacts"), "mode": "rw"}}
    command, given = python("print('done')"), runner.kfp.container_run_args
    code = runner.start(start(printed), client, "sha256:bb", command, kfps, **given)
    assert (code, printed) == (0, ["done\n"])
    options = client.made[0].options
    assert options["image"] == "sha256:bb"
    assert (options["user"], options["read_only"], options["network_mode"]) == ("1000:1000", True, "none")
    assert options["cap_drop"] == ["ALL"]
    assert "no-new-privileges" in options["security_opt"]
    assert list(options["tmpfs"]) == ["/tmp"]
    assert options["mem_limit"] == 64 * 2**30
    assert options["volumes"] == {
        str(tmp_path / name): {"bind": str(tmp_path / name), "mode": "rw"} for name in ("runs", "models", "serving")
    }


@pytest.mark.parametrize("code", [0, 3, 137])
def test_the_exit_code_is_asked_for_before_the_container_is_removed(
    runner: Containers, client: Engine, code: int
) -> None:
    assert runner.start(start([]), client, "i", python(f"import sys; sys.exit({code})"), {}) == code
    assert client.made[0].events == ["waited", "removed"]


def test_a_container_is_asked_to_end_and_removed_when_the_run_is_interrupted(
    runner: Containers, client: Engine
) -> None:
    printed: list[str] = []

    def interrupt(line: str) -> None:
        printed.append(line)
        if line == "training\n":
            raise KeyboardInterrupt

    command = python(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('checkpoint', flush=True), sys.exit(143)))\n"
        "print('training', flush=True); time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        runner.start(Start("sft", {}, interrupt), client, "i", command, {})
    assert client.made[0].events == ["SIGTERM", "sh -c kill -TERM -1", "removed"]
    assert printed == ["training\n", "checkpoint\n"]


def test_steps_see_what_is_theirs_and_nothing_else_of_the_environment(
    runner: Containers, client: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "PLUMBLINE_RUN_DIR", "HF_TOKEN", "SSH_AUTH_SOCK", "JUDGE_TOKEN"):
        monkeypatch.setenv(name, "set")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "key.json")
    runner.start(start([], PLUMBLINE_PARENT_RUN="p"), client, "i", python(""), {}, environment={"OF_THE_TASK": "t"})
    seen = client.made[0].options["environment"]
    assert {"MLFLOW_TRACKING_URI", "PLUMBLINE_RUN_DIR", "HF_TOKEN"} <= seen.keys()
    assert seen["GOOGLE_APPLICATION_CREDENTIALS"] == str(Path.cwd() / "key.json")
    assert (seen["PLUMBLINE_PARENT_RUN"], seen["OF_THE_TASK"]) == ("p", "t")
    assert not {"SSH_AUTH_SOCK", "JUDGE_TOKEN", "HOME", "PATH", "TMPDIR"} & seen.keys()


def test_a_variable_that_the_settings_name_is_passed(
    tmp_path: Path, client: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "hush")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    scorer = {"kind": "url", "url": "http://scorer", "token_env": "JUDGE_TOKEN"}
    given = {"rl": {"reward_scorer": scorer}, "upload": {"registry": str(tmp_path / "models")}}
    given["deploy"] = {"serving_dir": str(tmp_path / "serving")}
    runner = Containers(Settings.model_validate(given), tmp_path, {"sft": "i"}, "bridge")
    runner.start(start([]), client, "i", python(""), {})
    assert client.made[0].options["environment"]["JUDGE_TOKEN"] == "hush"


@component
def leave(code: int, task: str, metrics: Output[Metrics]) -> None:
    import os
    from pathlib import Path

    print("the container says", os.environ["PLUMBLINE_RUN_DIR"], flush=True)
    Path(metrics.path).write_text("{}")
    os._exit(code) if code else None


@pytest.mark.parametrize(("code", "status"), [(0, "succeeded"), (5, "failed")])
def test_a_step_that_fails_in_its_container_fails_the_run(
    runner: Containers,
    client: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    status: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing is tracked

    @dsl.pipeline(name="leaving")
    def pipeline() -> None:
        for task in ("demo", "sft"):
            node = leave(code=code, task=task).set_display_name(task)
            runner.equip(task, node)

    monkeypatch.setattr(local.Ledger, "open", lambda *_: None)
    ended = local.run(Plan(pipeline, "leaving", ("demo", "sft"), {}), tmp_path / "runs", Screen(io.StringIO()), runner)
    assert ended == (1 if code else 0)
    log = (tmp_path / "runs/latest/log.txt").read_text()
    assert f"the container says {(tmp_path / 'runs/latest').resolve()}" in log
    assert f'"status": "{status}"' in (tmp_path / "runs/latest/summary.json").read_text()
    images = [made.options["image"] for made in client.made]
    assert sorted(images) == ["sha256:aa", "sha256:bb"] if not code else len(images) == 1
    assert ("its process ended with code 5" in capsys.readouterr().err) == bool(code)


def test_lines_are_put_together_from_what_a_stream_was_cut_into() -> None:
    text = "första\r\nandra\rtredje\n\nλ slut"
    for size in (1, 2, 3, 100):
        raw = text.encode()
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert list(lines(pieces)) == ["första\n", "andra\n", "tredje\n", "\n", "λ slut\n"]
    assert list(lines([])) == []


def test_an_image_goes_by_its_identity_and_a_missing_one_is_a_persons_to_build(client: Engine) -> None:
    assert image_id(client, "plumbline/train:0.1.0") == "sha256:1234"  # under Podman's name for it
    with pytest.raises(InputError, match=r"plumbline/pipeline:0.1.0 is not on this machine.*make images"):
        image_id(client, "plumbline/pipeline:0.1.0")


def test_a_run_shares_what_it_writes_and_the_files_its_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "base").mkdir()
    given = {
        "preprocess": {"preferences": ["pairs.jsonl", "gs://bucket/more"]},
        "base": {"model": "base"},
        "checkpoints": "kept",
        "upload": {"registry": "gs://bucket/models"},
    }
    found = mounts(anchored(Settings.model_validate(given)), Path("runs"))
    assert found == [
        Mount(tmp_path / "runs", writable=True),
        Mount(tmp_path / "kept", writable=True),
        Mount(tmp_path / "serving", writable=True),
        Mount(tmp_path / "pairs.jsonl", writable=False),
        Mount(tmp_path / "base", writable=False),
    ]
    assert all((tmp_path / name).is_dir() for name in ("runs", "kept", "serving"))
    assert not (tmp_path / "gs:").exists()


def test_the_file_that_signs_in_at_google_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "key.json")
    assert mounts(anchored(Settings()), Path("runs"))[-1] == Mount(tmp_path / "key.json", writable=False)


def test_the_files_of_the_demo_world_stay_inside_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = anchored(Settings.model_validate({"demo": {}, "preprocess": {"prompts": "prompts.jsonl"}}))
    assert settings.preprocess.prompts[0].path == "prompts.jsonl"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DOCKER_HOST": "unix:///nowhere"}, "DOCKER_HOST is unix:///nowhere; no container engine answers there"),
        ({"PATH": ""}, "no container engine answers. Start Docker, or install Podman"),
    ],
)
def test_without_an_engine_a_person_is_told(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str
) -> None:
    def nobody() -> None:
        raise DockerException("connection refused")

    monkeypatch.setattr(docker, "from_env", nobody)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=reason), engine.engine():
        pass


def test_a_podman_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> None:
        raise DockerException("connection refused")

    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\necho newuidmap is missing >&2; exit 125\n")
    podman.chmod(0o755)
    monkeypatch.setattr(docker, "from_env", nobody)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    with pytest.raises(InputError, match="podman system service does not run: newuidmap is missing"), engine.engine():
        pass
    assert "DOCKER_HOST" not in os.environ


def test_the_command_asks_for_the_package_that_speaks_with_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.plans import contained

    monkeypatch.setitem(sys.modules, "docker", None)
    for name in ("pipeline.containers", "pipeline.engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(InputError, match=r"pip install 'plumbline\[containers\]'"):
        contained(Settings(), Path("runs"), "none")
