"""Fingerprints change with the code behind a step and with the files its settings name, and with nothing else."""

import shutil
from pathlib import Path

import pytest

from components.errors import InputError
from pipeline.fingerprints import ROOT, code_files, fingerprints
from pipeline.overrides import CONFIGS, resolve


def names(step: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in code_files(step)}


def test_the_code_of_a_step_is_its_folder_and_what_that_reaches() -> None:
    sft = names("sft")
    assert {"components/sft/step.py", "components/settings.py", "components/training.py"} <= sft
    assert "components/errors.py" in sft  # reached over another file
    assert not any(name.startswith(("components/rl/", "components/reward/", "pipeline/")) for name in sft)
    assert "components/launch.py" not in sft


def test_imports_inside_functions_and_of_packages_count(tmp_path: Path) -> None:
    for name, text in {
        "components/__init__.py": "",
        "components/toy/step.py": "def run():\n    from components.lamps import oil\n",
        "components/toy/component.py": "from components import unrelated\n",
        "components/lamps/__init__.py": "import components.wicks\n",
        "components/lamps/oil.py": "",
        "components/wicks.py": "",
        "components/unrelated.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = {path.relative_to(tmp_path / "components").as_posix() for path in code_files("toy", tmp_path)}
    assert found == {"toy/step.py", "lamps/__init__.py", "lamps/oil.py", "wicks.py"}


def test_a_source_files_content_changes_the_fingerprint_of_preprocess_alone(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text("1")
    settings = resolve([], [f"preprocess.preferences={source}"])
    before = fingerprints(settings)
    source.write_text("2")
    after = fingerprints(settings)
    assert {task for task in before if before[task] != after[task]} == {"preprocess"}
    shutil.copy(source, tmp_path / "copy")
    assert fingerprints(settings) == after


def test_the_code_of_a_judge_named_in_the_settings_belongs_to_evaluate_alone() -> None:
    without = fingerprints(resolve([]))
    named = fingerprints(resolve([], ["evaluate.judge=components.demo.judge:judge_all"]))
    assert {task for task in named if named[task] != without[task]} == {"evaluate"}
    assert fingerprints(resolve([], ["evaluate.judge=no.such.module:judge"])) == without


def test_the_code_of_a_scoring_function_belongs_to_rl_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_scores.py").write_text("def score(prompts, responses): return [0.0 for _ in responses]")
    settings = resolve([], ["rl.reward_scorer.kind=function", "rl.reward_scorer.name=my_scores:score"])
    before = fingerprints(settings)
    (tmp_path / "my_scores.py").write_text("def score(prompts, responses): return [1.0 for _ in responses]")
    after = fingerprints(settings)
    assert {task for task in before if before[task] != after[task]} == {"rl"}


def test_a_missing_source_is_told_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"preprocess\.preferences\.0\.path: nowhere\.jsonl: no such file"):
        fingerprints(resolve([], ["preprocess.preferences=nowhere.jsonl"]))


def test_files_of_the_demo_world_need_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(fingerprints(resolve([Path("demo")]))) == 12


def test_the_cost_task_runs_the_reward_steps_code() -> None:
    digests = fingerprints(resolve([]))
    assert digests["cost"] == digests["reward"] != digests["sft"]


def test_a_reports_page_belongs_to_the_code_of_its_step() -> None:
    assert "components/evaluate/report.html.j2" in {str(path.relative_to(ROOT)) for path in code_files("evaluate")}


def test_a_model_in_the_home_directory_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    digests = set()
    for content in ("one", "two"):
        (tmp_path / "model" / "config.json").write_text(content)
        digests.add(fingerprints(resolve([CONFIGS / "demo.yaml"], ["base.model=~/model"]))["base"])
    assert len(digests) == 2
