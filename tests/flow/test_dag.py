"""The compiled pipeline: order, gate, parameters, resources, and the committed pipeline.yaml."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp.compiler import Compiler

from pipeline.dag import build
from pipeline.overrides import resolve
from pipeline.package import write_package

ROOT = Path(__file__).parents[2]


def compiled(tmp_path: Path, *overrides: str, config: str = "default") -> dict[str, Any]:
    settings = resolve([Path(config)], overrides)
    path = tmp_path / "pipeline.yaml"
    write_package(settings, path)
    return dict(yaml.safe_load(path.read_text()))


def nodes(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task by its display name, with the tasks it waits for by theirs."""
    found = {}
    for dag in [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]:
        display = {name: task["taskInfo"]["name"] for name, task in dag["tasks"].items()}
        for name, task in dag["tasks"].items():
            after = {display[other] for other in task.get("dependentTasks", [])}
            found[display[name]] = {**task, "after": after}
    return found


def container(spec: dict[str, Any], task: str) -> dict[str, Any]:
    component = spec["components"][nodes(spec)[task]["componentRef"]["name"]]
    return dict(spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"])


def test_the_committed_pipeline_is_the_compiled_default(tmp_path: Path) -> None:
    compiled(tmp_path)
    fresh, committed = (tmp_path / "pipeline.yaml").read_bytes(), (ROOT / "pipeline.yaml").read_bytes()
    assert fresh == committed, "pipeline.yaml is not what the code compiles to: run `make compile`"


def test_tasks_wait_for_what_they_read_and_training_for_validation(tmp_path: Path) -> None:
    after = {name: node["after"] for name, node in nodes(compiled(tmp_path, config="demo")).items()}
    assert after == {
        "sources": set(),
        "demo": set(),
        "preprocess": {"demo", "sources"},
        "base": {"demo", "preprocess", "sources"},
        "validate": {"base", "preprocess"},
        "sft": {"base", "preprocess", "validate"},
        "reward": {"preprocess", "sft"},
        "cost": {"preprocess", "sft"},
        "rl": {"cost", "preprocess", "reward", "sft"},
        "evaluate": {"cost", "preprocess", "reward", "rl", "sft", "sources"},
        "passed": {"cost", "evaluate", "preprocess", "reward", "rl", "sources"},
        "upload": set(),
        "deploy": {"upload"},
        "infer": {"deploy", "upload"},
    }


def test_only_the_gate_is_a_condition(tmp_path: Path) -> None:
    conditions = {
        name: node["triggerPolicy"]["condition"]
        for name, node in nodes(compiled(tmp_path)).items()
        if "triggerPolicy" in node
    }
    assert list(conditions) == ["passed"]
    assert "evaluate-Output" in conditions["passed"]


def test_without_a_cost_limit_there_is_no_cost_task(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "rl.algorithm.name=ppo")
    assert "cost" not in nodes(spec)
    assert "cost" not in spec["root"]["inputDefinitions"]["parameters"]
    assert "cost" not in nodes(spec)["rl"]["inputs"].get("artifacts", {})


def test_every_task_has_one_dict_parameter_with_its_settings(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "rl.rollouts=17")
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == set(nodes(spec)) - {"passed", "sources"}
    assert {parameter["parameterType"] for parameter in parameters.values()} == {"STRUCT"}
    assert parameters["rl"]["defaultValue"]["rollouts"] == 17
    assert parameters["cost"]["defaultValue"]["kind"] == "cost"


def test_reward_and_cost_know_which_task_they_are(tmp_path: Path) -> None:
    named = nodes(compiled(tmp_path))
    for task in ("reward", "cost"):
        assert named[task]["inputs"]["parameters"]["task"]["runtimeValue"]["constant"] == task


def test_gpus_cpu_memory_images_and_retries_are_on_the_compiled_tasks(tmp_path: Path) -> None:
    overrides = ["resources.sft.gpus=4", "resources.sft.memory=200Gi", "resources.sft.cpu=12"]
    spec = compiled(tmp_path, *overrides, "resources.sft.retries=5", "images.train=registry/train:1")
    sft, light = container(spec, "sft"), container(spec, "upload")
    assert sft["image"] == "registry/train:1"
    assert light["image"] == "plumbline/pipeline:0.1.0"
    assert sft["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert sft["resources"]["accelerator"]["resourceCount"] == "4"
    assert sft["resources"]["resourceMemoryLimit"] == "200Gi"
    assert sft["resources"]["resourceCpuLimit"] == "12"
    assert "accelerator" not in light["resources"]
    assert nodes(spec)["sft"]["retryPolicy"]["maxRetryCount"] == 5
    assert nodes(spec)["sft"]["retryPolicy"]["backoffFactor"] == 2.0


def test_training_tasks_know_where_their_checkpoints_are_kept_between_attempts(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "checkpoints=gs://bucket/kept", config="demo")
    place = {"name": "PLUMBLINE_CHECKPOINTS", "value": "gs://bucket/kept"}
    told = {task for task in nodes(spec) if task != "passed" and place in container(spec, task).get("env", [])}
    assert told == {"base", "sft", "reward", "cost", "rl"}
    assert "env" not in container(compiled(tmp_path, config="demo"), "sft")


def test_the_sources_are_looked_at_on_a_cluster_before_what_reads_them_and_never_cached(tmp_path: Path) -> None:
    spec = compiled(tmp_path)
    found = nodes(spec)
    assert "enableCache" not in found["sources"].get("cachingOptions", {})
    told = {
        name: node["inputs"]["parameters"]["fingerprint"]["taskOutputParameter"]["outputParameterKey"]
        for name, node in found.items()
        if "taskOutputParameter" in node["inputs"].get("parameters", {}).get("fingerprint", {})
    }
    assert told == {"preprocess": "preprocess", "base": "base", "evaluate": "evaluate"}
    # behind the gate the value comes through the gate
    assert "sources-infer" in found["infer"]["inputs"]["parameters"]["fingerprint"]["componentInputParameter"]
    assert container(spec, "sources")["image"] == container(spec, "upload")["image"]


def test_fingerprints_enter_the_tasks_and_resources_do_not_without_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    Compiler().compile(build(resolve([]), fingerprints={"sft": "abc"}), str(path))
    spec = yaml.safe_load(path.read_text())
    constants = {
        name: node["inputs"]["parameters"]["fingerprint"]["runtimeValue"]["constant"]
        for name, node in nodes(spec).items()
        if name != "passed"
    }
    assert constants.pop("sft") == "abc"
    assert set(constants.values()) == {""}
    assert "resources" not in container(spec, "sft")


@pytest.mark.parametrize("config", ["demo", "hh", "ppo", "ppo_lag"])
def test_every_configuration_compiles(tmp_path: Path, config: str) -> None:
    assert "infer" in nodes(compiled(tmp_path, config=config))
