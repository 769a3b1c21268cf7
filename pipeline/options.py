"""Arguments and options that several commands have."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from components.storage import refuse_remote

Configs = Annotated[
    list[str],
    typer.Option("--config", "-c", help="YAML file, also on gs://, or demo, hh, ...; give it again for overlays."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as rl.algorithm.kl_coef=0.02."),
]
ServingDir = Annotated[str, typer.Option("--dir", help="The folder that deploy publishes to.")]
RunsDir = Annotated[str, typer.Option(help="Where local runs, cache and tracking lie.")]
InContainers = Annotated[bool, typer.Option("--containers", help="Every step in a container of its image.")]
Network = Annotated[
    str | None, typer.Option(help="The containers' network: bridge (the default), host, none or a name.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A local run's id or latest; else the id of a cluster's run.")]
Experiment = Annotated[str | None, typer.Option(help="Kubeflow's experiment; without it, the pipeline's name.")]
CONNECTION: dict[str, Any] = {
    "host": Annotated[
        str | None, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="Kubeflow Pipelines: https://host/pipeline.")
    ],
    "namespace": Annotated[
        str | None, typer.Option(envvar="PLUMBLINE_NAMESPACE", help="Yours, where Kubeflow has several users.")
    ],
    "token_file": Annotated[
        Path | None,
        typer.Option(envvar="PLUMBLINE_TOKEN_FILE", help="File with a bearer token; or set PLUMBLINE_TOKEN."),
    ],
    "ca_cert": Annotated[
        Path | None, typer.Option(envvar="PLUMBLINE_CA_CERT", help="Certificates to trust, as a PEM file.")
    ],
}
"""How a cluster is reached. A token itself is no option: the command line is for all to see."""


def runs_folder(runs_dir: str) -> Path:
    """The folder of local runs. Raises InputError for one on gs://."""
    return refuse_remote(runs_dir, "--runs-dir", "where the runner's processes, its cache and its database can write")


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of CONNECTION in place of its parameter `connection`."""
    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name != "connection"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        from pipeline.connection import Connection

        connection = Connection(**{name: given.pop(name) for name in CONNECTION})
        command(connection=connection, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in CONNECTION.items()]
    parameters = [parameter.replace(kind=keyword) for parameter in own] + added
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
