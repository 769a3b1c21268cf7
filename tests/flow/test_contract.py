"""A step and its Kubeflow face have the same signature."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from components.launch import STEPS, path_parameters, settings_class

FOLDERS = sorted(path.parent.name for path in Path(import_module("components").__path__[0]).glob("*/step.py"))


def kinds_of(component) -> dict[str, str]:
    """Every artifact of a component: input, output or optional."""
    spec = component.component_spec
    inputs = {
        name: "optional" if put.optional else "input"
        for name, put in (spec.inputs or {}).items()
        if put.type.startswith("system.")
    }
    outputs = {name: "output" for name, put in spec.outputs.items() if put.type.startswith("system.")}
    return inputs | outputs


def test_all_eleven_steps_are_found() -> None:
    assert len(FOLDERS) == 11
    assert set(FOLDERS) == set(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_and_its_component_agree(step: str) -> None:
    run = import_module(f"components.{step}.step").run
    component = getattr(import_module(f"components.{step}.component"), step)
    parameters = path_parameters(run)
    *_, output = parameters
    expected = {name: "optional" if optional else "input" for name, optional in parameters.items()}
    assert kinds_of(component) == expected | {output: "output", "metrics": "output"}
    plain = set(component.component_spec.inputs) - set(parameters)
    assert plain == {"settings", "task", "fingerprint"}
    assert component.component_spec.inputs["task"].default == step


@pytest.mark.parametrize("step", STEPS)
def test_a_step_takes_its_own_settings_and_paths_alone(step: str) -> None:
    signature = inspect.signature(import_module(f"components.{step}.step").run, eval_str=True)
    first, *paths = signature.parameters.values()
    assert (first.name, first.annotation) == ("settings", settings_class(step))
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {path.kind for path in paths} == {inspect.Parameter.KEYWORD_ONLY}
    assert {path.annotation for path in paths} <= {Path, Path | None}
    assert signature.return_annotation == dict[str, float]


def test_the_report_on_a_runs_end_is_no_step_and_takes_what_kubeflow_says_of_the_others() -> None:
    component = import_module("components.notify.component").notify
    assert "notify" not in {*STEPS, *FOLDERS}
    assert {name: put.type for name, put in component.component_spec.inputs.items()} == {
        "pipeline": "String",
        "status": "PipelineTaskFinalStatus",
    }
    assert not component.component_spec.outputs
    assert set(component.python_func.__code__.co_names) == {"components.notify.ending", "report"}
    parameters = inspect.signature(import_module("components.notify.ending").report).parameters
    assert len(parameters) == 2


@pytest.mark.parametrize("step", STEPS)
def test_a_components_body_is_one_import_and_one_call(step: str) -> None:
    component = getattr(import_module(f"components.{step}.component"), step)
    assert set(component.python_func.__code__.co_names) == {"components.launch", "launch"}
    assert component.component_spec.implementation.container.image == "python:3.11"
