"""The command line: quick to start, one message for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.artifacts import write_manifest
from components.registry import promote, register
from components.serving.folder import publish


def plumbline(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_command_line_and_the_pipeline_load_no_training_library() -> None:
    code = (
        "import sys, pathlib, pipeline.cli, pipeline.local, pipeline.package, pipeline.fingerprints\n"
        "from pipeline.overrides import resolve\n"
        "pipeline.fingerprints.fingerprints(resolve([pathlib.Path('demo')]))\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'pandas', 'numpy', 'pyarrow', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "-c", "demo", "rl.algorithm.kl_coeff=1"],
        ["run", "-c", "nowhere.yaml"],
        ["run", "-c", "hh", "preprocess.preferences=nowhere.jsonl"],
        ["run", "-c", "demo", "--network", "none"],
        ["compile", "-o", "pipeline.json"],
        ["base", "--text", "nowhere.txt", "--out", "model"],
        ["track", "runs/latest"],
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    done = plumbline(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["run"], ["run", "--nope"], ["fly"]])
def test_a_wrong_command_is_exit_code_2_too(arguments: list[str], tmp_path: Path) -> None:
    done = plumbline(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage" in done.stderr


def test_config_prints_the_resolved_settings() -> None:
    import yaml

    shown = yaml.safe_load(plumbline("config", "-c", "demo", "-c", "ppo", "rl.rollouts=3").stdout)
    assert (shown["name"], shown["rl"]["algorithm"]["name"], shown["rl"]["rollouts"]) == ("demo", "ppo", 3)


def test_demo_writes_the_demo_files(tmp_path: Path) -> None:
    done = plumbline("demo", "--out", str(tmp_path / "raw"), "--seed", "4")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "raw" / "prompts.jsonl").read_text().splitlines()[0])
    assert "prompt" in row
    assert f"wrote {tmp_path / 'raw'}" in done.stdout


@pytest.mark.parametrize("command", [["demo"], ["base", "--text", "text.txt"]])
def test_a_folder_of_a_person_is_not_written_over(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one document\n\nanother")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prompts.jsonl").write_text("mine")
    done = plumbline(*command, "--out", "mine", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --out is mine, which holds files that would be lost (prompts.jsonl)")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]


def test_a_rollback_moves_the_champion_in_the_runs_own_database_or_says_that_it_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    digests = []
    for content in ("one", "two"):
        version = tmp_path / content
        version.mkdir()
        (version / "model.safetensors").write_text(content)
        digests.append(write_manifest(version, "version"))
        publish(version, "tiny", tmp_path / "serving")
    done = plumbline("rollback", cwd=tmp_path)
    assert done.returncode == 0 and "champion alias was not moved" in done.stdout
    assert not (tmp_path / "runs").exists()

    (tmp_path / "records").mkdir()
    address = f"sqlite:///{tmp_path / 'records' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for digest in digests:
        register("tiny", str(tmp_path), digest)
    promote("tiny", digests[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    done = plumbline("rollback", "--runs-dir", "records", cwd=tmp_path)
    assert done.stdout.splitlines() == [f"serving serves {digests[1][:12]}", "MLflow's champion is tiny version 2"]
    client = MlflowClient(address, address)
    assert client.get_model_version_by_alias("tiny", "champion").tags == {"digest": digests[1]}
