"""Local runs looked at again: their table, a step's log, and the settings for running them again from a step on."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import write_json
from components.errors import InputError
from pipeline.cli import main
from pipeline.documents import read_document, write_document
from pipeline.history import show
from pipeline.local import Plan
from pipeline.logs import local_log
from pipeline.overrides import resolve
from pipeline.reruns import settings_again
from pipeline.runs import RunFolder
from pipeline.screen import Screen
from pipeline.summary import Result, summarize


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of the demo that has got as far as base: demo was cached, preprocess ran."""
    made = RunFolder.create(tmp_path / "runs")
    settings = resolve([Path("demo")], ["rl.rollouts=7"]).model_dump(mode="json", exclude_none=True)
    (made.path / "settings.yaml").write_text(write_document(settings))
    made.record("demo", status="cached", metrics={}, seconds=0.5)
    made.record("preprocess", status="succeeded", metrics={"preprocess/num_rows": 90.0}, seconds=4.0)
    made.log.write_text("=== preprocess\nreading\n90 rows\n=== base\nprogress base 1/9\n")
    return made


def shown(folder: RunFolder) -> list[str]:
    stream = io.StringIO()
    show(folder.path, Screen(stream))
    return stream.getvalue().splitlines()


def test_a_run_under_way_shows_what_its_steps_recorded(folder: RunFolder) -> None:
    lines = shown(folder)
    assert [line.split() for line in lines[2:6]] == [
        ["demo", "cached", "0.5", "s"],
        ["preprocess", "succeeded", "4.0", "s", "preprocess/num_rows", "90"],
        ["base", "running", "0.0", "s"],
        ["validate", "waiting"],
    ]
    assert any(line.startswith("running for ") for line in lines)
    assert "  no summary yet: it is still running, or its process was killed" in lines
    folder.record("base", status="stopped", error="stopped by SIGTERM", seconds=2.0)
    assert shown(folder)[4].split() == ["base", "failed", "2.0", "s"]


def test_a_run_that_ended_shows_its_summary(folder: RunFolder) -> None:
    results = {"demo": Result("demo", "cached"), "rl": Result("rl", "failed", 9.0, {"a/b": float("nan")})}
    write_json(folder.summary, summarize(folder.run_id, "failed", 75.0, ("demo", "rl", "infer"), results))
    lines = shown(folder)
    assert [line.split()[:2] for line in lines[2:5]] == [["demo", "cached"], ["rl", "failed"], ["infer", "skipped"]]
    assert "failed in 1:15" in lines and lines[-2].split() == ["run", folder.run_id]


def test_a_folder_that_is_no_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"other: no settings\.yaml"):
        show(tmp_path / "other", Screen(io.StringIO()))
    with pytest.raises(InputError, match=r"other: no log\.txt"):
        local_log(RunFolder(tmp_path / "other"), "rl")
    with pytest.raises(InputError, match=r"settings\.yaml: cannot be read"):
        settings_again(tmp_path / "other", "rl", ())


def test_the_log_of_a_step_is_its_part_of_the_runs(folder: RunFolder) -> None:
    assert local_log(folder, "preprocess") == "reading\n90 rows\n"
    assert local_log(folder, "base") == "progress base 1/9\n"
    with pytest.raises(InputError, match="demo was taken from the cache"):
        local_log(folder, "demo")
    with pytest.raises(InputError, match=r"'rl' did not run in .*; those that did: preprocess, base"):
        local_log(folder, "rl")


def test_settings_for_a_rerun_are_the_runs_own_with_a_new_word_for_the_step(folder: RunFolder) -> None:
    before = read_document(folder.path / "settings.yaml")
    words = set()
    for _ in range(2):
        after = settings_again(folder.path, "rl", ["evaluate.num_prompts=9"]).model_dump(mode="json", exclude_none=True)
        words.add(after["rl"].pop("rerun"))
        assert after.pop("evaluate") == before["evaluate"] | {"num_prompts": 9}
        assert after == {key: value for key, value in before.items() if key != "evaluate"}
    assert len(words) == 2
    with pytest.raises(InputError, match=r"sft\.seed=1: with --step rl, settings of rl, evaluate, upload, deploy"):
        settings_again(folder.path, "rl", ["sft.seed=1"])


def test_a_local_run_is_found_by_its_folder_and_run_again_here(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    monkeypatch.chdir(folder.path.parents[1])
    plans: list[Plan] = []
    monkeypatch.setattr("pipeline.plans.run", lambda plan, runs_dir, screen, runner: plans.append(plan) or 3)

    def go(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["plumbline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    assert go("rerun", "latest", "--step", "evaluate")[0] == 3
    assert plans[0].settings["evaluate"]["rerun"] and plans[0].settings["rl"]["rollouts"] == 7
    code, out = go("status", folder.run_id)
    assert code == 0 and "running for" in out
    assert go("logs", "latest", "preprocess") == (0, "reading\n90 rows\n")
    for command in (["rerun", "latest", "--step", "rl"], ["status", "latest"]):
        assert go(*command, "--wait")[0] == 2  # who started it sees it to its end
    assert go("rerun", "elsewhere", "--step", "rl", "--containers")[0] == 2
