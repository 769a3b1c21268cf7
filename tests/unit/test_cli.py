"""The command line: quick to start, one message for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
        ["compile", "-o", "pipeline.json"],
        ["base", "--text", "nowhere.txt", "--out", "model"],
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
