"""Prints what pyproject.toml asks for: the core, and the extras that are named; a line for each.

An image installs this before the project itself, so that a change of code changes its last, small layer alone.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirements of the project with these extras, in order."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + [name for extra in extras for name in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml"), sys.argv[1:])))
