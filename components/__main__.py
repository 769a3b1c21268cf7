"""One step by hand: `python -m components sft --settings sft.yaml --data DIR --base DIR --model DIR`.

The options are the step's own paths, each a local one or a gs:// address; the last one is what it writes. Its numbers
are printed and left in `<output>.metrics/`.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.launch import EXPECTED, STEPS, ending, path_parameters, run_step, step_function
from components.outputs import claimed
from components.storage import fetch, is_remote, local_path, new_folder


def main(arguments: list[str]) -> int:
    """The exit code: 0, or what `ending` says, with its message."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("components").setLevel(logging.INFO)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"{__doc__}\nSteps: {', '.join(STEPS)}")
            return 0
        print(json.dumps(_run(arguments[0], arguments[1:]), indent=2))
    except EXPECTED as error:
        code, line = ending(error, arguments[0])
        print(line, file=sys.stderr)
        return code
    return 0


def _run(step: str, options: list[str]) -> dict[str, float]:
    """The metrics of the step, run with the options a person gave."""
    parameters = path_parameters(step_function(step))
    parser = argparse.ArgumentParser(prog=f"python -m components {step}")
    parser.add_argument("--settings", help=f"a YAML file with the keys below `{step}:`")
    for name, optional in parameters.items():
        parser.add_argument(f"--{name}", required=not optional)
    chosen: dict[str, str | None] = vars(parser.parse_args(options))
    settings = _read(_input("settings", chosen.pop("settings")))
    *inputs, output = parameters
    paths = {name: _input(name, chosen[name]) for name in inputs}
    address = str(chosen[output])
    with claimed(step, address, f"--{output}") as place, _metrics_folder(address) as folder:
        return run_step(step, settings, {**paths, output: place}, metrics_file=folder / "metrics.json", task=step)


def _input(option: str, address: str | None) -> Path | None:
    """What an option names, as a local path; None where it was left out. Raises InputError when nothing is there."""
    try:
        return None if address is None else fetch(address)
    except InputError as error:
        raise InputError(f"--{option}: {error}") from None


@contextmanager
def _metrics_folder(address: str) -> Iterator[Path]:
    """Where the numbers of the step are left: beside its output, on gs:// when the step has ended."""
    beside = address.rstrip("/") + ".metrics"
    if is_remote(address):
        with new_folder(beside) as folder:
            yield folder
    else:
        yield local_path(beside)


def _read(path: Path | None) -> dict[str, Any]:
    """The settings in a YAML file; none without a file. Raises InputError for what is not a mapping."""
    import yaml

    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {values!r}; accepted: a mapping of the step's settings.")
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
