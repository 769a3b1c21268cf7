"""The command line. Every command is a few lines that call something else; nothing here imports torch."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from components.errors import InputError
from components.launch import EXPECTED, ending
from pipeline import kubeflow, schedules
from pipeline.options import Configs, InContainers, Network, Overrides, RunsDir, ServingDir, runs_folder

app = typer.Typer(
    help="RLHF on Kubeflow: from raw human feedback to an aligned, evaluated, deployed model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(kubeflow.app)
app.add_typer(schedules.app, name="schedule")


def main() -> None:
    """Run the command; a mistake that a person can fix is one message and exit code 2, and so on, as `ending` says."""
    try:
        app()
    except EXPECTED as error:
        code, line = ending(error, sys.argv[1])
        print(line, file=sys.stderr)
        sys.exit(code)


@app.command()
def run(
    config: Configs,
    overrides: Overrides = None,
    runs_dir: RunsDir = "runs",
    containers: InContainers = False,
    network: Network = None,
) -> None:
    """Run the whole pipeline on this machine."""
    from pipeline.overrides import resolve
    from pipeline.plans import run_here

    raise typer.Exit(run_here(resolve(config, overrides or ()), runs_folder(runs_dir), containers, network))


@app.command("compile")
def compile_(
    overrides: Overrides = None,
    config: Configs = ["default"],  # noqa: B006  # typer reads it, nobody changes it
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write, also on gs://.")] = "pipeline.yaml",
) -> None:
    """Write the pipeline as YAML for a Kubeflow cluster."""
    from pipeline.overrides import resolve
    from pipeline.package import write_package

    settings = resolve(config, overrides or ())
    write_package(settings, output)
    print(f"wrote {output}: {len(settings.tasks())} tasks")


@app.command("config")
def show_config(config: Configs, overrides: Overrides = None) -> None:
    """Print the settings that the files and overrides make together."""
    from pipeline.documents import write_document
    from pipeline.overrides import resolve

    print(write_document(resolve(config, overrides or ()).model_dump(mode="json", exclude_none=True)), end="")


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="The folder to write, also on gs://.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other rows of the same world.")] = 0,
) -> None:
    """Write the demo world's files, in the formats that your own data can have."""
    _alone("demo", {"seed": seed}, "raw", out)


@app.command()
def base(
    text: Annotated[str, typer.Option(help=".txt with blank lines between documents, or .jsonl; also on gs://.")],
    out: Annotated[str, typer.Option(help="The model folder to write, also on gs://.")],
    size: Annotated[str, typer.Option(help="About so many parameters: 1m, 3m, 7m or 40m.")] = "1m",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a small base model, with its tokenizer, from your own text."""
    _alone("base", {"text": text, "size": size, "seed": seed}, "base", out, raw=None, data=Path())


@app.command()
def serve(
    serving: ServingDir = "serving",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve the deployed model with an OpenAI-compatible interface."""
    from components.serving.app import serve as serve_folder

    serve_folder(serving, host, port)


@app.command()
def rollback(serving: ServingDir = "serving", runs_dir: RunsDir = "runs") -> None:
    """Serve the version again that was served before; once more switches forth again."""
    from components.champion import move_champion
    from components.serving.folder import name_champion
    from components.serving.folder import rollback as switch_back
    from components.storage import local_path
    from pipeline.ledger import registry_environment
    from pipeline.surroundings import environment

    place = runs_folder(runs_dir)
    served = switch_back(serving)
    print(f"{serving} serves {served.version}")
    try:
        moved = move_champion(local_path(serving) / served.path)
    except InputError as error:
        print(f"The champion that candidates must beat was not moved: {error}")
    else:
        if moved:
            print(f"{moved}: the champion is {served.version}")
    with environment(registry_environment(place)):
        number = name_champion(served)
    if number is None:
        print(
            "MLflow's champion alias was not moved: no registry with this version was reached. Name the folder of its "
            "runs with --runs-dir, or set MLFLOW_TRACKING_URI."
        )
    else:
        print(f"MLflow's champion is {served.name} version {number}")


@app.command()
def track(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, such as runs/latest, or of a step.")],
) -> None:
    """Send MLflow what it could not be told while a run lasted."""
    from pipeline.ledger import send_unsent

    send_unsent(folder, print)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Address of a server.")] = "http://127.0.0.1:8000",
) -> None:
    """Talk to a served model; /reset starts over, /regenerate tries again."""
    from components.serving.chat import chat as talk

    talk(url)


@app.command()
def conformance(
    against: Annotated[str, typer.Option(help="trl, or the package.module with your functions.")] = "ours",
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="Precision of the tensors.")] = "float64",
    functions: Annotated[bool, typer.Option("--functions", help="Print what a module may offer, and stop.")] = False,
) -> None:
    """Check losses, advantages and estimators against golden vectors: ours, TRL's or your own trainer's.

    The vectors are inputs and results of plain-Python formulas in float64, gradients included. --against names a
    module with any of the functions that --functions prints, over torch tensors and by keyword; what it has not is
    "not offered", and so is a variant for which it raises NotImplementedError("why"). A dictionary DIFFERENCES in it
    excuses vectors (function/vector, or function) that differ on purpose, with the reason. The exit code is 0 when
    all that is offered passes, 1 otherwise.
    """
    from components.conformance.report import conform, print_functions

    if functions:
        print_functions()
    elif not conform(against, dtype):
        raise typer.Exit(1)


def _alone(step: str, settings: dict[str, Any], output: str, out: str, **inputs: Path | None) -> None:
    """Run one step outside a pipeline, its output at the address `out`; say what it wrote and measured."""
    from components.launch import run_step
    from components.outbox import UNSENT_FILE
    from components.outputs import claimed

    scratch = Path(tempfile.mkdtemp(prefix="plumbline-"))
    try:
        with claimed(step, out, "--out") as place:
            paths = {**inputs, output: place}
            metrics = run_step(step, settings, paths, metrics_file=scratch / "metrics.json", task=step)
    finally:
        if not (scratch / UNSENT_FILE).exists():  # which a warning has named
            shutil.rmtree(scratch)
    for metric, value in metrics.items():
        print(f"{metric:<28}{value:.6g}")
    print(f"wrote {out}")
