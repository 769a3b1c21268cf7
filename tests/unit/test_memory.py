"""benchmarks/memory.py: both sides take the same rows at a time, and the table compares like with like."""

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import memory
import roles
from components.artifacts import DataDir
from components.settings import Compute
from components.tokens import encode_prompt, encode_response, load_tokenizer
from memory import Peak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the smallest size, and the data."""
    made = tmp_path_factory.mktemp("roles")
    roles.make(made, "1m")
    return made


def test_every_row_has_as_many_tokens_as_a_rollout_s(folder: Path) -> None:
    tokenizer, data = load_tokenizer(folder / "1m" / "policy"), DataDir(folder / "data")
    rows, prompts = data.demonstrations("train"), data.prompts("train")
    assert len(rows) == len(prompts) == roles.STEPS * 32
    assert {len(encode_prompt(tokenizer, row.prompt)) for row in [*rows, *prompts]} == {64}
    assert {len(encode_response(tokenizer, row.response)) for row in rows} == {64}


def noted(run: Any, seen: list[Any]) -> Any:
    """A step that also puts its settings into `seen`."""

    def made(settings: Any, **paths: Path) -> Any:
        seen.append(settings)
        return run(settings, **paths)

    return made


@pytest.mark.parametrize(
    ("what", "shared"), [("sft", 0), ("shared", 2), ("critics", 0), ("separate", 0), ("halved", 0)]
)
def test_what_is_measured_is_what_it_is_called(
    what: str, shared: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    seen: list[Any] = []
    for step in (roles.rl, roles.sft):
        monkeypatch.setattr(step, "run", noted(step.run, seen))
    with caplog.at_level(logging.INFO, logger="components.scoring.shared"):
        roles.run(what, folder, "1m", Compute(dtype="fp32"), tmp_path / "m")
    (settings,) = seen
    said = [record.getMessage() for record in caplog.records if record.name == "components.scoring.shared"]
    assert sum("shares the policy's backbone" in line for line in said) == shared
    assert len(said) == (2 if what in ("shared", "critics") else 0)
    assert settings.lora.rank == 8
    if what == "sft":
        assert settings.training.batch_tokens == 16 * 128 and settings.training.accumulation == 2
    else:
        assert settings.micro_batch_size == settings.generation.batch_size == 16 and settings.minibatch_size == 32
        assert settings.share_backbone == (what in ("shared", "critics"))
        assert settings.frozen_dtype == ("bf16" if what == "halved" else "fp32")


def test_a_measurement_is_one_line_of_json(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["roles.py", "sft", str(folder), "--size", "1m", "--checkpointing"])
    given: list[Any] = []
    monkeypatch.setattr(roles, "run", lambda *arguments: given.append(arguments))
    roles.main()
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"peak_mb", "growth_mb"} and found["peak_mb"] > 100 and found["growth_mb"] >= 0
    assert given[0][:4] == ("sft", folder, "1m", Compute(dtype="fp32", gradient_checkpointing=True))


def test_every_row_is_compared_with_the_sft_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [
        Peak("sft", "7m", "fp32", False, 1000.0, 600.0),
        Peak("sft", "7m", "fp32", True, 800.0, 400.0),
        Peak("shared", "7m", "fp32", False, 1200.0, 720.0),
        Peak("separate", "7m", "fp32", True, 1600.0, 1200.0),
        Peak("shared", "7m", "bf16", True, 1600.0, 1200.0),
    ]
    lines = memory.report(peaks).splitlines()[4:]
    assert lines == [
        "| LoRA SFT | 7m | fp32 | no | 1000 (600) | - |",
        "| LoRA SFT | 7m | fp32 | yes | 800 (400) | - |",
        "| PPO-Lag, six roles on one backbone | 7m | fp32 | no | 1200 (720) | 1.20 (1.20), goal 1.5 |",
        "| critics of their own, too | 7m | fp32 | yes | 1600 (1200) | 2.00 (3.00) |",
        "| PPO-Lag, six roles on one backbone | 7m | bf16 | yes | 1600 (1200) | - |",
    ]


class FakeChildren:
    """Answers in place of processes; the last kind of work fails."""

    def __init__(self, **_: Any) -> None:
        self.commands: list[tuple[Any, ...]] = []

    def run(self, *command: Any) -> tuple[int, str]:
        """Exit code and output."""
        self.commands.append(command)
        if command[1] == "critics":
            return 3, ""
        return 0, "noise\n" + json.dumps({"peak_mb": 900.0, "growth_mb": 500.0})

    def last_words(self) -> str:
        """Why it failed."""
        return "no room"


def test_a_part_is_printed_alone_and_a_failure_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    made = FakeChildren()
    monkeypatch.setattr(memory, "nursery", lambda **_: nullcontext((Path(), made)))
    monkeypatch.setattr(memory, "HERE", tmp_path)  # where there is no README to write into
    assert memory.main(["--sizes", "7m", "--dtypes", "fp32", "--what", "shared"]) == 0
    assert [command[1] for command in made.commands] == ["make", "sft", "shared", "sft", "shared"]
    assert [command[-1] for command in made.commands[-2:]] == ["--checkpointing"] * 2
    assert "| 900 (500) | 1.00 (1.00), goal 1.5 |" in capsys.readouterr().out
    assert memory.main(["--sizes", "7m", "--dtypes", "fp32", "--what", "critics"]) == 1
    assert "critics --size 7m --dtype fp32 failed: no room" in capsys.readouterr().err


def test_the_whole_run_replaces_the_table_between_its_markers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = FakeChildren()
    monkeypatch.setattr(made, "run", lambda *_: (0, json.dumps({"peak_mb": 900.0, "growth_mb": 500.0})))
    monkeypatch.setattr(memory, "nursery", lambda **_: nullcontext((Path(), made)))
    monkeypatch.setattr(memory, "HERE", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nx\n<!-- /bench -->\n<!-- memory -->\nold\n<!-- /memory -->\nafter\n")
    assert memory.main([]) == 0
    text = readme.read_text()
    assert "old" not in text and text.count("| 900 (500) |") == 2 * 2 * 2 * 5
    assert text.startswith("before\n<!-- bench -->\nx\n") and text.endswith("<!-- /memory -->\nafter\n")
