"""The decorator that makes a Kubeflow component of a step's face (`<step>/component.py`)."""

from collections.abc import Callable
from typing import Any

from kfp import dsl


def component(function: Callable[..., Any]) -> Any:
    """The Kubeflow component of a function whose body is one import and one call.

    The image named here is a place-holder: `pipeline/resources.py` puts the real ones on the tasks. They hold
    kfp and this package, so nothing is installed when a task starts.
    """
    return dsl.component(function, base_image="python:3.11", install_kfp_package=False)
