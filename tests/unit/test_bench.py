"""`make bench`: the workload is the same for both sides, steps are measured, the table says what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bench
import children
import ours
import tables
import workload
from components.artifacts import DataDir
from components.errors import InputError
from components.tokens import encode_prompt, encode_response, load_tokenizer
from measurement import WORK, Measurement, Stopwatch, Task, median, pass_updates, peak_mb
from tables import Cell, Run

BENCH = Path(bench.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload of one measured step, with the smallest model."""
    made = tmp_path_factory.mktemp("workload")
    workload.build(made, ["1m"], steps=1)
    return made


def made_run(*cells: Cell) -> Run:
    about = {"data": "", "left_out": 0, "sft_tokens": 800, "pair_tokens": 1600}
    return Run(7, 2, {"torch": "2"}, None, about, list(cells))


def cell(system: str, seconds: float, peak: float, what: str = "dpo") -> Cell:
    sampled = 64.0 if what == "rloo" else None
    return Cell(system, what, "7m", "fp32", Measurement([9.0, seconds, 0.1], sampled, peak, peak / 2, 2))


def test_both_sides_read_the_same_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "1m" / "policy")
    data, texts = DataDir(folder / "whole"), json.loads((folder / "whole.json").read_text())
    pairs = data.preferences("train")
    assert len(pairs) == len(texts) == 2 * 16  # one step that is measured, and one before it
    for row, text in zip(pairs, texts, strict=True):
        prompt = encode_prompt(tokenizer, row.prompt)
        assert tokenizer(text["prompt"])["input_ids"] == prompt
        for response in (text["chosen"], text["rejected"]):
            whole = [*tokenizer(text["prompt"] + response)["input_ids"], tokenizer.eos_token_id]
            assert whole == prompt + encode_response(tokenizer, response)
            assert 40 <= len(whole) <= 256
    asked = [encode_prompt(tokenizer, row.prompt) for row in data.prompts("train")]
    assert [tokenizer(row["prompt"])["input_ids"] for row in json.loads((folder / "prompts.json").read_text())] == asked
    assert {len(ids) for ids in asked} == {64}


def test_too_few_pairs_are_refused_with_their_number(tmp_path: Path) -> None:
    pairs = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(InputError, match=r"few.jsonl: 20 pairs of at most 256 tokens; 7 steps need 128"):
        workload.build(tmp_path / "out", [], 7, tmp_path / "few.jsonl")


@pytest.mark.parametrize("what", ["rloo", "dpo_later", "sft"])
def test_our_steps_are_measured_one_by_one(folder: Path, what: str) -> None:
    found = ours.measure(Task(what, folder, "1m", "fp32", steps=1))
    assert len(found.seconds) == 1 and found.seconds[0] > 0
    assert found.peak_mb >= found.growth_mb >= 0
    assert (found.response_tokens is not None) == (what == "rloo")
    assert found.response_tokens is None or 32 < found.response_tokens <= 64


def test_the_peak_is_that_of_the_whole_process_and_no_phase_starts_it_over(folder: Path) -> None:
    with mmap(-1, 512 << 20) as held:
        for place in range(0, len(held), PAGESIZE):
            held[place] = 1
    highest = peak_mb()
    assert ours.measure(Task("rloo", folder, "1m", "fp32", steps=1)).peak_mb >= highest


def test_steps_before_the_first_measured_one_are_left_out() -> None:
    task = Task("dpo_later", Path(), "7m", "fp32", steps=2)
    watch = Stopwatch(before_mb=1.0, peak_mb=3.0, ends=[0.0, 10.0, 11.0, 13.0])
    assert task.skipped == pass_updates(2) == 2 and task.updates == 4
    assert watch.result(task, 1) == Measurement([1.0, 2.0], None, 3.0, 2.0, 1)


def test_a_median_is_the_middle_value_or_the_mean_of_two() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_every_work_has_a_goal_and_a_trainer() -> None:
    pytest.importorskip("trl")
    import peer

    assert list(WORK) == list(tables.GOALS) == list(peer.TRAINERS)


def test_the_table_has_times_ratios_and_goals() -> None:
    text = tables.report(made_run(cell("peer", 3.0, 800.0), cell("ours", 1.5, 400.0)))
    # 1600 tokens in 8 steps are 200 a step
    assert "| DPO | 7m | fp32 | 1.500 (133) | 3.000 (67) | 2.00 (2.5) | 400 (200) | 800 (400) | 0.50 (0.7) |" in text
    assert "2 threads. torch 2. Made-up pairs. Median of 7 steps." in text


def test_sampled_tokens_are_counted_as_they_were_sampled() -> None:
    text = tables.report(made_run(cell("ours", 2.0, 400.0, "rloo")))
    assert "| RLOO | 7m | fp32 | 2.000 (1024) | - | - | 400 (200) | - | - |" in text  # 32 of 64 tokens in 2 s
    assert "Sampled responses have 64.0 (ours) tokens on average." in text


def test_a_measurement_that_failed_is_shown_as_such() -> None:
    failed = Cell("peer", "dpo", "7m", "fp32", None, "exit code 1: out of memory")
    assert "| failed | - | 400 (200) | failed | - |" in tables.report(made_run(cell("ours", 1.0, 400.0), failed))
    assert tables.progress(failed).endswith("failed: exit code 1: out of memory")


def test_a_new_table_replaces_the_old_one_and_nothing_else() -> None:
    once = tables.written("# Before\n", "old")
    assert once == "# Before\n\n<!-- bench -->\nold\n<!-- /bench -->\n"
    assert tables.written(once + "after\n", "new") == "# Before\n\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n"


def test_without_trl_there_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "installed", lambda name: name != "trl")
    assert bench.main(["--quick"]) == 2
    assert capsys.readouterr().err == (
        "trl is not installed, and the peer is TRL. Install the dev extra (`make setup`), or measure ours alone: "
        "--only ours.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "rloo,ppo"], "'ppo' is none of rloo, grpo"),
        (["--steps", "0"], "'0' is no number above 0"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_only_a_whole_run_replaces_the_table() -> None:
    whole = bench.parsed([])
    assert whole.readme == BENCH.parent / "README.md"
    assert (whole.sizes, whole.dtypes, whole.steps) == (("7m", "40m"), ("fp32", "bf16"), 7)
    quick = bench.parsed(["--quick"])
    assert (quick.sizes, quick.dtypes, quick.steps, quick.readme) == (("7m",), ("fp32",), 3, None)
    assert bench.parsed(["--only", "ours"]).readme is None


def begun(process: int) -> Iterator[int]:
    """Processes that this one has started and that have begun with their script."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            has_begun = b"workload.py" in path.with_name("cmdline").read_bytes()
            if has_begun and int(path.read_text().rpartition(")")[2].split()[1]) == process:
                yield int(path.parent.name)
        except OSError:  # it has ended since
            continue


def test_a_signal_that_comes_while_a_child_starts_kills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(children, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    before = signal.getsignal(signal.SIGINT)
    with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
        children.Children(1, log).run("workload.py")
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is before


def _hear_interrupts() -> None:
    """Where the tests run in a shell's background, Ctrl-C is ignored, and what they start would ignore it too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks children up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_behind(number: signal.Signals) -> None:
    command = [sys.executable, str(BENCH), "--only", "ours", "--what", "sft", "--sizes", "1m"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ, preexec_fn=_hear_interrupts)
    while not (started := list(begun(run.pid))):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert errors == "\nInterrupted after 0 measurements; no table was written.\n"
    assert not any(Path(f"/proc/{child}").exists() for child in started)
