"""The task that looks at the data behind the addresses when a cluster's run starts.

A schedule's runs all have the same parameters, so Kubeflow's cache would answer them for ever. This task is never
cached; what it finds becomes the fingerprint of the tasks that read the sources, and so a part of their cache keys.
"""

from typing import NamedTuple

from components.component import component

READERS = ("preprocess", "base", "evaluate", "infer")
"""The tasks that read something from outside, in the order of the outputs."""


@component
def sources(
    preprocess: dict[str, object],
    base: dict[str, object],
    evaluate: dict[str, object],
    infer: dict[str, object],
    code: dict[str, object],
    demo: bool,
) -> NamedTuple(  # type: ignore[valid-type]  # kfp reads the outputs from here
    "Fingerprints", [("preprocess", str), ("base", str), ("evaluate", str), ("infer", str)]
):
    """Digests what the tasks read from outside, so that new data behind the same address is seen."""
    from components.launch import sourced_fingerprints

    settings = {"preprocess": preprocess, "base": base, "evaluate": evaluate, "infer": infer}
    return sourced_fingerprints(settings, code, demo)
