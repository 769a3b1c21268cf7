"""`benchmarks/gpu.py`: refused without a GPU, in time, and content with torch, transformers and accelerate."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import absent
import bench
import device
import gpu
from children import Children
from measurement import WORK, GpuStopwatch, Measurement, Stopwatch, Task, stopwatch
from tables import LEFT_OUT, Cell, Run, report

ROOT = Path(gpu.__file__).parents[1]
MISSING = ("pydantic", "pydantic_core", "pyarrow", "pandas", "httpx", "peft", "mlflow", "matplotlib", "kfp", "datasets",
           "deepspeed", "google.cloud", "trl", "rich")  # fmt: skip


def made_run(*cells: Cell) -> Run:
    about = {"data": "", "left_out": 0, "sft_tokens": 800, "pair_tokens": 1600}
    return Run(4, 8, {"torch": "2"}, None, about, list(cells), gpu.GPU_LOAD, "NVIDIA H100, 80 GB, CUDA 13.0")


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main([]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "sees no CUDA GPU" in errors
    assert "--device cpu --size 1m --steps 1" in errors


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=80e9))
    assert device.main() == 0
    assert capsys.readouterr().out.startswith("NVIDIA H100, 80 GB, CUDA ")


def test_what_is_not_measured_in_time_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Calm:
        def run(self, script: str, *arguments: object, limit_s: float) -> tuple[int, str]:
            (tmp_path / "about.json").write_text(json.dumps({"sft_tokens": 8, "pair_tokens": 8}))
            return 0, ""

    def measured(children: Any, system: str, task: Task, limit_s: float) -> tuple[Measurement, str]:
        assert 0 < limit_s <= 60 and task.load == gpu.STANDARD and task.dtype == "bf16"
        order.append((task.what, system))
        monkeypatch.setattr(gpu.time, "monotonic", lambda: start + 15.0 * len(order))
        return Measurement([1.0], None, 2.0, 1.0, 1), ""

    order: list[tuple[str, str]] = []
    start = time.monotonic()
    given, run = gpu.parsed(["--device", "cpu", "--size", "1m", "--what", "rloo,dpo,sft"]), made_run()
    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: start)
    assert gpu.measure(run, given, ["ours", "peer"], tmp_path, Calm(), start + 40.0) == ""  # type: ignore[arg-type]
    assert order == [("rloo", "ours"), ("rloo", "peer"), ("dpo", "peer")]
    assert [cell.problem for cell in run.cells] == ["", "", "", LEFT_OUT, LEFT_OUT, LEFT_OUT]
    assert gpu.omissions(run) == "Left out when the time was up: DPO (ours), SFT (ours), SFT (TRL)."


def test_a_process_that_outlasts_its_time_is_killed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        children = Children(1, log)
        with pytest.raises(subprocess.TimeoutExpired):
            children.run("workload.py", tmp_path / "out", limit_s=0.2)
        task = Task("sft", tmp_path, "1m", "bf16", 1)
        assert bench.measured(children, "ours", task, limit_s=0.2) == (None, LEFT_OUT)


def test_the_table_names_the_gpu_and_its_reserved_memory() -> None:
    cells = [Cell("ours", "rloo", "0.5b", "bf16", Measurement([2.0], 100.0, 900.0, 900.0, 8, 1000.0)),
             Cell("peer", "rloo", "0.5b", "bf16", None, LEFT_OUT)]  # fmt: skip
    text = report(made_run(*cells))
    assert "NVIDIA H100, 80 GB, CUDA 13.0, 8 threads." in text and "peak MB (reserved)" in text
    # 128 responses of 100 tokens in 2 s
    assert "| RLOO | 0.5b | bf16 | 2.000 (6400) | left out | - | 900 (1000) | left out | - |" in text


def test_the_table_says_what_failed_and_that_trl_is_missing() -> None:
    run = made_run(Cell("ours", "dpo", "0.5b", "bf16", None, "exit code 1: CUDA out of memory"))
    assert gpu.omissions(run) == "TRL was not measured. DPO (ours) failed: exit code 1: CUDA out of memory."
    whole = [Cell(system, "dpo", "0.5b", "bf16", Measurement([1.0], None, 1, 1, 1)) for system in ("ours", "peer")]
    assert gpu.omissions(made_run(*whole)) == ""


def test_a_gpu_is_waited_for_and_its_memory_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("waited"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5_000_000)
    watch = stopwatch("cuda")
    watch.lap()
    watch.lap()
    found = watch.result(Task("sft", Path(), "1m", "bf16", 1), 1)
    assert calls == ["waited"] * 2 and (found.peak_mb, found.growth_mb, found.reserved_mb) == (3.0, 3.0, 5.0)
    assert isinstance(watch, GpuStopwatch) and type(stopwatch("cpu")) is Stopwatch


def test_only_a_whole_run_on_a_gpu_is_written_down() -> None:
    given = gpu.parsed([])
    assert given.readme == ROOT / "benchmarks" / "README.md"
    assert (given.what, given.size, given.load, given.seconds < 9 * 60) == (tuple(WORK), "0.5b", gpu.GPU_LOAD, True)
    for part in (["--device", "cpu"], ["--only", "ours"], ["--size", "1m"], ["--what", "sft"]):
        assert gpu.parsed(part).readme is None


def test_plain_settings_have_the_defaults_of_their_classes() -> None:
    class Inner(absent.Plain):
        rate: float = absent.Default(1.0, gt=0)
        names: tuple[str, ...] = ("a",)

    class Outer(Inner):
        kind: str
        inner: Inner = Inner(rate=2.0)
        names: tuple[str, ...] = ("b",)

    made = Outer(kind="x", rate=3.0)
    assert made.model_dump(mode="json") == {
        "rate": 3.0, "names": ("b",), "kind": "x", "inner": {"rate": 2.0, "names": ("a",)},
    }  # fmt: skip
    with pytest.raises(TypeError, match="Outer needs kind"):
        Outer()
    with pytest.raises(TypeError, match="Inner has no colour"):
        Inner(colour="red")


def test_ours_runs_where_only_torch_transformers_and_accelerate_are_installed(tmp_path: Path) -> None:
    code = f"""
import importlib.metadata, json, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
for name in {MISSING!r}:
    sys.modules[name] = None  # as if it were not there
real = importlib.metadata.version
def version(name):
    if name == "plumbline":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
import workload, ours
from measurement import Load, Task
folder, load = Path({str(tmp_path)!r}), Load(rows=4, responses=8, response_tokens=8)
workload.build(folder, ["1m"], 1, load=load)
for what in ("rloo", "dpo", "reward", "sft"):
    print(what, len(ours.measure(Task(what, folder, "1m", "bf16", 1, load)).seconds))
print(sorted(path.name for path in (folder / "whole" / "prompts").iterdir()))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if not line.startswith("progress")]
    assert lines == ["rloo 1", "dpo 1", "reward 1", "sft 1", "['test.json', 'train.json']"]
