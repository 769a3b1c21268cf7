"""Peak memory of PPO-Lag with adapters against that of one LoRA SFT at the same batch.

    python benchmarks/memory.py [--sizes 7m] [--dtypes fp32] [--what shared,separate]

Every measurement is a process of its own; roles.py says what they do. The whole run writes its table into README.md
beside this file; a part of it is printed alone. Times are not measured, so the machine may be busy. Exits 1 when a
measurement fails.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import DTYPES, SIZES, versions
from children import HERE, Children, nursery
from options import some
from tables import machine, written

GOAL = 1.5
"""Times the peak of sft that PPO-Lag on one backbone may take at most."""
WHAT = {
    "sft": "LoRA SFT",
    "shared": "PPO-Lag, six roles on one backbone",
    "critics": "reward and cost model of their own",
    "separate": "critics of their own, too",
    "halved": "the same, reward and cost in bf16",
}
"""What is measured, and how the table calls it."""


@dataclass(frozen=True)
class Peak:
    """What one process took."""

    what: str
    size: str
    dtype: str
    checkpointing: bool
    peak_mb: float
    """The most memory that was resident, from the first import to the saved model."""
    growth_mb: float
    """How far that is above what was resident with all libraries loaded and no model yet."""

    @property
    def beside(self) -> tuple[str, str, bool]:
        """What it has in common with the SFT that it is compared with."""
        return self.size, self.dtype, self.checkpointing


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="memory.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=some(SIZES), default=("7m", "40m"), help="7m,40m by default")
    parser.add_argument("--dtypes", type=some(DTYPES), default=DTYPES, help="fp32,bf16 by default")
    parser.add_argument("--what", type=some(tuple(WHAT)), default=tuple(WHAT), help="beside sft; all by default")
    given = parser.parse_args(arguments)
    whole = (given.sizes, given.dtypes, given.what) == (("7m", "40m"), DTYPES, tuple(WHAT))
    with nursery(threads=1) as (folder, children):
        peaks, failed = measured(children, folder, given.sizes, given.dtypes, given.what)
    text = report(peaks)
    print(f"\n{text}")
    if whole and not failed:
        readme = HERE / "README.md"
        readme.write_text(written(readme.read_text("utf-8"), text, "memory"), "utf-8")
    return int(failed)


def measured(
    children: Children, folder: Path, sizes: Sequence[str], dtypes: Sequence[str], what: Sequence[str]
) -> tuple[list[Peak], bool]:
    """One peak after the other, and whether some could not be taken."""
    peaks, failed = list[Peak](), False
    cases = [(size, dtype, more) for size in sizes for dtype in dtypes for more in (False, True)]
    for size in sizes:
        code, _ = children.run("roles.py", "make", folder, "--size", size)
        if code:
            print(f"{size} failed: {children.last_words()}", file=sys.stderr)
            return peaks, True
    for size, dtype, checkpointing in cases:
        for name in dict.fromkeys(("sft", *what)):
            options = ["--size", size, "--dtype", dtype, *(["--checkpointing"] if checkpointing else [])]
            code, output = children.run("roles.py", name, folder, *options)
            if code:
                print(f"{name} {' '.join(options)} failed: {children.last_words()}", file=sys.stderr)
                failed = True
                continue
            peak = Peak(name, size, dtype, checkpointing, **json.loads(output.splitlines()[-1]))
            peaks.append(peak)
            took = f"{peak.peak_mb:.0f} MB, {peak.growth_mb:.0f} above start"
            print(f"{name:<9}{' '.join(options):<42}{took}", flush=True)
    return peaks, failed


def report(peaks: Sequence[Peak]) -> str:
    """Machine and versions in a line, then the table: each row beside the SFT of its size, dtype and checkpointing."""
    shown = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "trl")
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, one thread. {shown}.",
        "",
        "| work | model | dtype | checkpointing | peak MB (above start) | times SFT's (above start) |",
        "|---|---|---|---|---|---|",
    ]
    plain = {peak.beside: peak for peak in peaks if peak.what == "sft"}
    for peak in peaks:
        ratio = "-"
        if peak.what != "sft" and (sft := plain.get(peak.beside)):
            goal = f", goal {GOAL:g}" if peak.what == "shared" else ""
            ratio = f"{peak.peak_mb / sft.peak_mb:.2f} ({peak.growth_mb / sft.growth_mb:.2f}){goal}"
        memory = f"{peak.peak_mb:.0f} ({peak.growth_mb:.0f})"
        checkpointing = "yes" if peak.checkpointing else "no"
        lines.append(f"| {WHAT[peak.what]} | {peak.size} | {peak.dtype} | {checkpointing} | {memory} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
