"""pipeline.yaml: what a Kubeflow cluster is given."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from kfp.compiler import Compiler

from components.errors import InputError
from components.storage import put_text
from pipeline.dag import build
from pipeline.resources import equip
from pipeline.settings import Settings

HEADER = ("# PIPELINE DEFINITION", "# Name:", "# Description:")


def write_package(settings: Settings, address: str | Path) -> None:
    """Compile the pipeline of the settings into a file, here or on gs://.

    Raises InputError for a name that is not YAML's.
    """
    if not str(address).endswith((".yaml", ".yml")):
        raise InputError(f"--output is {address}; accepted: a name that ends in .yaml.")
    put_text(compiled(settings), str(address))


def compiled(settings: Settings, fingerprints: Mapping[str, str] | None = None) -> str:
    """The pipeline of the settings as YAML, which depends on them, the fingerprints and the code alone.

    kfp's header lists the defaults in an order that differs from process to process; that part is left out, and
    the defaults are in the document itself.
    """
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        raw = Path(scratch) / "pipeline.yaml"
        Compiler().compile(build(settings, fingerprints=fingerprints, equip=equip(settings)), str(raw))
        lines = raw.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#") or line.startswith(HEADER))
