"""What `make cluster-test` tried against what: every test says so, and a table at the end says how it went.

    @pytest.mark.tried("the demo pipeline in containers", against="Podman or Docker")

A test that learns only while it runs what it really had before it says so by `record_property("against", ...)`.
"""

import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HEADER = ("what", "against", "result")
WORST_FIRST = ("failed", "error", "skipped", "passed")
BUILD_S = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of this folder that says nothing is refused; what tests say, of others too, is carried to the table."""
    for item in items:
        marker = item.get_closest_marker("tried")
        if marker is None and Path(__file__).parent not in item.path.parents:
            continue
        if marker is None or len(marker.args) != 1 or set(marker.kwargs) != {"against"}:
            raise pytest.UsageError(f'{item.nodeid}: say what it tries: @pytest.mark.tried("...", against="...")')
        item.user_properties += [("what", marker.args[0]), ("against", marker.kwargs["against"])]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, a line for everything that was tried; the worst result of its tests."""
    results: dict[tuple[str, str], str] = {}
    for result in reversed(WORST_FIRST):  # so that the worst is written last
        for report in terminalreporter.stats.get(result, ()):
            told = dict(getattr(report, "user_properties", ()))
            if "what" in told:
                results[told["what"], told["against"]] = result
    if not results:
        return
    rows = [HEADER, *((what, against, result) for (what, against), result in sorted(results.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    terminalreporter.section("what was tried against what")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


@pytest.fixture(scope="session")
def engine_name() -> str:
    """docker or podman; the test is skipped where neither answers."""
    done = subprocess.run([ROOT / "containers/engine.sh"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip())
    return done.stdout.strip()


@pytest.fixture(scope="session")
def images(engine_name: str) -> dict[str, str]:
    """The names of the images, built from this tree, by their short ones; and `base`, what they were built from."""
    base = subprocess.run([ROOT / "containers/base.sh"], capture_output=True, text=True, check=False)
    if base.returncode:
        pytest.skip(base.stderr.strip())
    environment = os.environ | {"BASE_IMAGE": base.stdout.strip()}
    built = subprocess.run(
        [ROOT / "containers/build.sh"], env=environment, capture_output=True, text=True, check=False, timeout=BUILD_S
    )
    assert built.returncode == 0, built.stdout + built.stderr
    names = ("pipeline", "train", "serve")
    return {name: f"plumbline/{name}:{version()}" for name in names} | {"base": environment["BASE_IMAGE"]}


@pytest.fixture
def against(record_property: Any, engine_name: str, images: dict[str, str]) -> None:
    """Says in the table which engine and which base image it was."""
    told = subprocess.run([engine_name, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    stand_in = " (a stand-in from Debian's packages)" if images["base"].startswith("plumbline/") else ""
    record_property("against", f"{told}; base {images['base']}{stand_in}")


def version() -> str:
    """The version that pyproject.toml states."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"])
