"""What a step reads from outside, and the task that looks at it when a cluster's run starts."""

from pathlib import Path
from typing import Any

import pytest

from components.errors import InputError
from components.sources import listed, source_digests
from components.storage import put_text
from pipeline.overrides import resolve
from pipeline.settings import TASKS, Settings
from pipeline.sources import READERS, sources


def digests(settings: Settings, task: str) -> dict[str, str]:
    return source_digests(task, settings.step(task), demo=settings.demo is not None)


def test_only_these_steps_read_from_outside() -> None:
    given = ["preprocess.prompts=p", "base.model=m", "evaluate.champion=c", "infer.prompts=i"]
    settings = resolve([], given)
    assert tuple(task for task in TASKS if task != "demo" and list(listed(settings.step(task)))) == READERS


def test_new_data_behind_an_address_is_another_digest(store: str) -> None:
    settings = resolve([], [f"preprocess.preferences={store}/p.jsonl", f"infer.prompts={store}/i.jsonl"])
    seen = []
    for content in ("one", "two"):
        for name in ("p", "i"):
            put_text(content, f"{store}/{name}.jsonl")
        seen.append((digests(settings, "preprocess"), digests(settings, "infer")))
    assert seen[0][0].keys() == {"preprocess.preferences.0.path"} and seen[0][1].keys() == {"infer.prompts"}
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


def test_a_models_name_and_what_the_demo_makes_have_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert digests(resolve([], ["base.model=Qwen/Qwen2.5-0.5B"]), "base") == {}
    assert digests(resolve([Path("demo")]), "preprocess") == {}
    (tmp_path / "model").mkdir()
    assert digests(resolve([], ["base.model=model", "base.text=unused.txt"]), "base").keys() == {"base.model"}


def looked(settings: Settings) -> tuple[str, ...]:
    """What the task gives, called as Kubeflow's executor calls it: with plain values."""
    values: dict[str, Any] = settings.model_dump(mode="json", exclude_none=True)
    code = dict.fromkeys(READERS, "code")
    found: tuple[str, ...] = sources.python_func(
        **{task: values[task] for task in READERS}, code=code, demo=settings.demo is not None
    )
    return found


def test_the_task_gives_each_reader_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")
    settings = resolve([], [f"preprocess.preferences={rows}", f"evaluate.champion={tmp_path}/tiny"])
    before = looked(settings)
    assert looked(settings) == before
    rows.write_text("2")
    assert [a == b for a, b in zip(before, looked(settings), strict=True)] == [False, True, True, True]
    put_text("{}", f"{tmp_path}/tiny/champion.json")
    assert [a == b for a, b in zip(before, looked(settings), strict=True)] == [False, True, False, True]


def test_a_source_that_is_not_there_ends_the_task_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    settings = resolve([], ["preprocess.preferences=nowhere.jsonl"])
    with pytest.raises(InputError, match=r"preprocess\.preferences\.0\.path: nowhere"):
        digests(settings, "preprocess")
    with pytest.raises(SystemExit) as ended:
        looked(settings)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: preprocess.preferences.0.path: nowhere.jsonl: no such file")
