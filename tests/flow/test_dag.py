"""The compiled pipeline: order, gate, parameters, resources, and the committed pipeline.yaml."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp.compiler import Compiler

from components.errors import InputError
from pipeline.dag import build
from pipeline.overrides import resolve
from pipeline.package import write_package
from pipeline.plans import plan
from pipeline.reruns import order_again

ROOT = Path(__file__).parents[2]


GROUPS = {"run", "passed"}


def compiled(tmp_path: Path, *overrides: str, config: str = "default") -> dict[str, Any]:
    """The compiled pipeline, what Kubernetes is asked beyond it under "platforms"."""
    settings = resolve([Path(config)], overrides)
    path = tmp_path / "pipeline.yaml"
    write_package(settings, path)
    spec, beyond = yaml.load_all(path.read_text(), yaml.CSafeLoader)
    return {**spec, **beyond}


def nodes(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task by its display name, with the tasks it waits for by theirs."""
    found = {}
    for _, dag in dags(spec):
        display = {name: task["taskInfo"]["name"] for name, task in dag["tasks"].items()}
        for name, task in dag["tasks"].items():
            after = {display[other] for other in task.get("dependentTasks", [])}
            found[display[name]] = {**task, "after": after}
    return found


def dags(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The pipeline and its groups: the parameters that each declares, and its tasks."""
    for component in (spec["root"], *spec["components"].values()):
        if "dag" in component:
            yield component.get("inputDefinitions", {}).get("parameters", {}), component["dag"]


def executor(spec: dict[str, Any], task: str) -> str:
    return str(spec["components"][nodes(spec)[task]["componentRef"]["name"]]["executorLabel"])


def container(spec: dict[str, Any], task: str) -> dict[str, Any]:
    return dict(spec["deploymentSpec"]["executors"][executor(spec, task)]["container"])


def pod(spec: dict[str, Any], task: str) -> dict[str, Any]:
    """What Kubernetes is asked for a task beyond its container."""
    return dict(spec["platforms"]["kubernetes"]["deploymentSpec"]["executors"][executor(spec, task)])


def parameters(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of a run."""
    return dict(spec["root"]["inputDefinitions"]["parameters"])


def environment(spec: dict[str, Any], task: str) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container(spec, task)["env"]}


def test_the_committed_pipeline_is_the_compiled_default(tmp_path: Path) -> None:
    compiled(tmp_path)
    fresh, committed = (tmp_path / "pipeline.yaml").read_bytes(), (ROOT / "pipeline.yaml").read_bytes()
    assert fresh == committed, "pipeline.yaml is not what the code compiles to: run `make compile`"


def test_tasks_wait_for_what_they_read_and_training_for_validation(tmp_path: Path) -> None:
    after = {name: node["after"] for name, node in nodes(compiled(tmp_path, config="demo")).items()}
    assert after == {
        "notify": {"run"},
        "run": set(),
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
        if "condition" in node.get("triggerPolicy", {})
    }
    assert list(conditions) == ["passed"]
    assert "evaluate-Output" in conditions["passed"]


def test_without_a_cost_limit_there_is_no_cost_task(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "rl.algorithm.name=ppo")
    assert "cost" not in nodes(spec)
    assert not [name for name in parameters(spec) if name.startswith("cost")]
    assert "cost" not in nodes(spec)["rl"]["inputs"].get("artifacts", {})


def test_every_task_has_one_dict_parameter_with_its_settings(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "rl.rollouts=17")
    steps = {name: parameter for name, parameter in parameters(spec).items() if "_" not in name}
    assert set(steps) == set(nodes(spec)) - {*GROUPS, "notify", "sources"}
    assert {parameter["parameterType"] for parameter in steps.values()} == {"STRUCT"}
    assert steps["rl"]["defaultValue"]["rollouts"] == 17
    assert steps["cost"]["defaultValue"]["kind"] == "cost"


def test_reward_and_cost_know_which_task_they_are(tmp_path: Path) -> None:
    named = nodes(compiled(tmp_path))
    for task in ("reward", "cost"):
        assert named[task]["inputs"]["parameters"]["task"]["runtimeValue"]["constant"] == task


def test_a_run_chooses_the_hardware_of_every_task_with_the_settings_as_defaults(tmp_path: Path) -> None:
    spec = compiled(
        tmp_path, "resources.rl.gpus=8", "resources.rl.memory=900Gi", "resources.rl.gpu_type=amd.com/gpu",
        "resources.rl.node_selector={pool: h100}", "resources.rl.tolerations=[{key: gpu, operator: Exists}]",
        "images.train=registry/train:1", "resources.upload.image=registry/upload:2",
    )  # fmt: skip
    chosen = {name: (p["parameterType"], p["defaultValue"]) for name, p in parameters(spec).items() if "_" in name}
    assert {name: value for name, value in chosen.items() if name.startswith("rl_")} == {
        "rl_image": ("STRING", "registry/train:1"),
        "rl_cpu": ("STRING", "16"),
        "rl_memory": ("STRING", "900Gi"),
        "rl_gpus": ("STRING", "8"),  # text: Kubeflow's driver gives a pod the text of a number as nothing
        "rl_gpu_type": ("STRING", "amd.com/gpu"),
        "rl_node_selector": ("STRUCT", {"pool": "h100"}),
        "rl_tolerations": ("LIST", [{"key": "gpu", "operator": "Exists"}]),
    }
    assert {name: value for name, value in chosen.items() if name.startswith("upload_")} == {
        "upload_image": ("STRING", "registry/upload:2"),
        "upload_cpu": ("STRING", "2"),
        "upload_memory": ("STRING", "8Gi"),
        "upload_node_selector": ("STRUCT", {}),
        "upload_tolerations": ("LIST", []),
    }
    assert not [name for name in chosen if name.startswith("notify")]


@pytest.mark.parametrize("task", ["rl", "infer"])
def test_a_pod_is_given_what_the_run_says_also_behind_the_gate(tmp_path: Path, task: str) -> None:
    spec = compiled(tmp_path)

    def channel(name: str) -> str:
        return f"{{{{$.inputs.parameters['pipelinechannel--{task}_{name}']}}}}"

    asked = container(spec, task)
    assert asked["image"] == channel("image")
    assert asked["resources"] == {
        "resourceCpuLimit": channel("cpu"),
        "resourceMemoryLimit": channel("memory"),
        "accelerator": {"resourceType": channel("gpu_type"), "resourceCount": channel("gpus")},
    }
    selector, (toleration,) = pod(spec, task)["nodeSelector"], pod(spec, task)["tolerations"]
    reference = {"componentInputParameter": f"pipelinechannel--{task}_node_selector"}
    assert selector == {"nodeSelectorJson": reference}
    assert toleration["tolerationJson"] == {"componentInputParameter": f"pipelinechannel--{task}_tolerations"}


def test_every_parameter_reaches_the_group_and_the_task_that_name_it(tmp_path: Path) -> None:
    spec, seen = compiled(tmp_path, config="demo"), set()
    for declared, dag in dags(spec):
        for task in dag["tasks"].values():
            inputs = task.get("inputs", {}).get("parameters", {})
            named = {put["componentInputParameter"] for put in inputs.values() if "componentInputParameter" in put}
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label is not None:
                text = str(spec["deploymentSpec"]["executors"][label]["container"]["resources"])
                text += spec["deploymentSpec"]["executors"][label]["container"]["image"]
                assert set(re.findall(r"parameters\['(.+?)'\]", text)) <= set(inputs)
                asked = spec["platforms"]["kubernetes"]["deploymentSpec"]["executors"][label]
                named |= set(re.findall(r"'componentInputParameter': '(.+?)'", str(asked)))
            assert named <= set(declared), task["taskInfo"]["name"]
            seen |= named
    assert {f"pipelinechannel--{name}" for name in parameters(spec)} <= seen


def test_a_task_that_handles_files_asks_no_gpu_and_no_shared_memory(tmp_path: Path) -> None:
    spec = compiled(tmp_path)
    assert "accelerator" not in container(spec, "upload")["resources"]
    assert "emptyDirMounts" not in pod(spec, "upload")


def test_retries_time_outs_and_shared_memory_are_fixed_in_the_compiled_pipeline(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "resources.sft.retries=5", "resources.sft.timeout_s=7200", "resources.sft.shm=32Gi")
    retry = nodes(spec)["sft"]["retryPolicy"]
    assert (retry["maxRetryCount"], retry["backoffDuration"], retry["backoffFactor"]) == (5, "60s", 2.0)
    assert retry["backoffMaxDuration"] == "2592000s"  # to Argo the end of all attempts, so far beyond any training
    assert pod(spec, "sft")["activeDeadlineSeconds"] == "7200"
    assert "activeDeadlineSeconds" not in pod(spec, "rl")
    (memory,) = pod(spec, "sft")["emptyDirMounts"]
    assert (memory["mountPath"], memory["medium"], memory["sizeLimit"]) == ("/dev/shm", "Memory", "32Gi")


SEVERAL = ("rl.compute={nodes: 8, processes: 8, strategy: zero3}", "exchange=gs://bucket/jobs")


def test_a_task_on_several_machines_says_what_their_pods_are(tmp_path: Path) -> None:
    spec = compiled(
        tmp_path, *SEVERAL, "resources.rl={gpus: 8, gpu_type: amd.com/gpu, cpu: 64, memory: 1Ti, shm: 64Gi}",
        "resources.rl.node_selector={pool: h100}", "resources.rl.tolerations=[{key: gpu, operator: Exists}]",
        "images.train=registry/train:1", "environment.HF_HOME=/cache", "image_pull_secrets=[registry]",
        "secrets=[{name: hub, env: {token: HF_TOKEN}, tasks: [base]}, {name: gcs, mount: /var/secrets/gcs}, "
        "{name: mlflow, env: {password: MLFLOW_TRACKING_PASSWORD}}]",
    )  # fmt: skip
    assert json.loads(environment(spec, "rl")["PLUMBLINE_TRAINJOB"]) == {
        "image": "registry/train:1",
        "exchange": "gs://bucket/jobs",
        "gpus": 8,
        "gpu_type": "amd.com/gpu",
        "cpu": "64",
        "memory": "1Ti",
        "shm": "64Gi",
        "node_selector": {"pool": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "variables": ["HF_HOME"],
        "secrets": [
            {"name": "gcs", "mount": "/var/secrets/gcs"},
            {"name": "mlflow", "env": {"password": "MLFLOW_TRACKING_PASSWORD"}},
        ],
        "image_pull_secrets": ["registry"],
    }
    assert "{{" not in environment(spec, "rl")["PLUMBLINE_TRAINJOB"]  # Argo would look for a parameter there
    account = {"name": "PLUMBLINE_SERVICE_ACCOUNT", "fieldPath": "spec.serviceAccountName"}
    assert account in pod(spec, "rl")["fieldPathAsEnv"]
    for task in ("sft", "reward", "evaluate"):
        assert "PLUMBLINE_TRAINJOB" not in environment(spec, task)


def test_the_own_pod_of_a_task_on_several_machines_asks_for_little(tmp_path: Path) -> None:
    spec = compiled(
        tmp_path, *SEVERAL, "resources.rl={gpus: 8, node_selector: {pool: h100}, retries: 4, timeout_s: 900}",
        "resources.rl.image=registry/rl:2", "resources.rl.tolerations=[{key: gpu, operator: Exists}]",
    )  # fmt: skip
    asked = container(spec, "rl")
    assert asked["image"] == "registry/rl:2"  # the pods': another image is another result
    assert asked["resources"]["resourceCpuLimit"] == "1" and asked["resources"]["resourceMemoryLimit"] == "2Gi"
    assert "accelerator" not in asked["resources"]
    assert "nodeSelector" not in pod(spec, "rl") and "emptyDirMounts" not in pod(spec, "rl")
    assert "h100" not in str(pod(spec, "rl")) and "gpu" not in str(pod(spec, "rl"))
    assert nodes(spec)["rl"]["retryPolicy"]["maxRetryCount"] == 4
    assert pod(spec, "rl")["activeDeadlineSeconds"] == "900"
    # what cannot be changed when the run starts is no parameter of it
    assert [name for name in parameters(spec) if name.startswith("rl")] == ["rl"]
    assert [name for name in parameters(spec) if name.startswith("sft_gpu")] == ["sft_gpu_type", "sft_gpus"]


@pytest.mark.parametrize("task", ["base", "sft", "reward", "cost"])
def test_every_task_that_trains_can_be_on_several_machines(tmp_path: Path, task: str) -> None:
    spec = compiled(tmp_path, f"{task}.training.compute.nodes=2", "exchange=/shared/jobs")
    with_pods = {name for name in set(nodes(spec)) - GROUPS if "PLUMBLINE_TRAINJOB" in environment(spec, name)}
    assert with_pods == {task}


@pytest.mark.parametrize(
    ("override", "key"),
    [("rl.compute.nodes=2", r"rl\.compute\.nodes"), ("sft.training.compute.nodes=2", r"sft\.training\.compute\.nodes")],
)
def test_several_machines_need_an_exchange_and_a_cluster(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key} is 2 and exchange is not set: .* Set exchange to a folder on gs://"):
        compiled(tmp_path, override)
    assert not (tmp_path / "pipeline.yaml").exists()
    with pytest.raises(InputError, match=rf"^{key} is 2, and a run on this machine has one\. .*`plumbline submit`"):
        plan(resolve([Path("default")], [override]))


def test_a_rerun_has_another_number_of_machines_where_it_was_compiled_with_several(tmp_path: Path) -> None:
    def again(*overrides: str) -> Any:
        run = SimpleNamespace(
            display_name="hh", experiment_id="e", runtime_config=None, service_account=None,
            pipeline_version_reference=SimpleNamespace(pipeline_id="p", pipeline_version_id="v"),
        )  # fmt: skip
        spec = compiled(tmp_path, *overrides)
        cluster: Any = SimpleNamespace(run=lambda run_id: run, spec=lambda run: spec)
        return order_again(cluster, "run-1", "rl", ["rl.compute.nodes=3"])

    assert again("rl.compute.nodes=2", "exchange=gs://bucket/jobs").parameters["rl"]["compute"]["nodes"] == 3
    with pytest.raises(InputError, match=r"^rl\.compute\.nodes is 3, and run run-1 was compiled with 1, .*submit"):
        again()


def test_every_task_runs_as_our_images_user_and_knows_kubeflows_id_of_the_run(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "name=hh")
    for task in set(nodes(spec)) - GROUPS:
        assert pod(spec, task)["securityContext"] == {"runAsUser": "10001", "runAsNonRoot": True}
        (field,) = pod(spec, task)["fieldPathAsEnv"]
        assert field == {"name": "PLUMBLINE_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        assert environment(spec, task)["MLFLOW_EXPERIMENT_NAME"] == "hh"


def test_secrets_are_in_the_compiled_pipeline_by_name_and_for_their_tasks_alone(tmp_path: Path) -> None:
    spec = compiled(
        tmp_path,
        "secrets=[{name: hub, env: {token: HF_TOKEN}, tasks: [base, rl]}, {name: gcs, mount: /var/secrets/gcs}, "
        "{name: hook, env: {url: PLUMBLINE_WEBHOOK}, tasks: [notify]}]",
        "environment.GOOGLE_APPLICATION_CREDENTIALS=/var/secrets/gcs/key.json",
        "environment.MLFLOW_EXPERIMENT_NAME=other",
        "image_pull_secrets=[registry]",
    )
    with_token = {task for task in set(nodes(spec)) - GROUPS if "HF_TOKEN" in str(pod(spec, task))}
    assert with_token == {"base", "rl"}
    (token,) = pod(spec, "rl")["secretAsEnv"]
    assert token["secretName"] == "hub" and token["optional"] is False
    assert token["keyToEnv"] == [{"secretKey": "token", "envVar": "HF_TOKEN"}]
    for task in set(nodes(spec)) - GROUPS:
        (key,) = pod(spec, task)["secretAsVolume"]
        assert (key["secretName"], key["mountPath"]) == ("gcs", "/var/secrets/gcs")
        assert pod(spec, task)["imagePullSecret"][0]["secretName"] == "registry"
        assert environment(spec, task)["GOOGLE_APPLICATION_CREDENTIALS"] == "/var/secrets/gcs/key.json"
        assert environment(spec, task)["MLFLOW_EXPERIMENT_NAME"] == "other"
        assert ("PLUMBLINE_WEBHOOK" in str(pod(spec, task))) == (task == "notify")


def test_a_secrets_value_does_not_get_as_far_as_a_compiled_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HF_TOKEN, which looks like a secret") as refused:
        compiled(tmp_path, "environment.HF_TOKEN=hf_s3cr3t")
    assert "s3cr3t" not in str(refused.value)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_the_report_on_the_end_runs_however_the_others_ended_and_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "name=hh", "resources.notify.node_selector={pool: small}")
    node = nodes(spec)["notify"]
    assert node["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert node["cachingOptions"] == {}
    assert node["inputs"]["parameters"]["pipeline"]["runtimeValue"]["constant"] == "hh"
    assert list(node["inputs"]["parameters"]["status"]) == ["taskFinalStatus"]
    assert container(spec, "notify")["image"] == "plumbline/pipeline:0.1.0"
    assert container(spec, "notify")["resources"]["resourceMemoryLimit"] == "2Gi"
    assert pod(spec, "notify")["activeDeadlineSeconds"] == "900"
    constant = pod(spec, "notify")["nodeSelector"]["nodeSelectorJson"]["runtimeValue"]["constant"]
    assert constant == {"pool": "small"}


def test_training_tasks_know_where_their_checkpoints_are_kept_between_attempts(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "checkpoints=gs://bucket/kept", config="demo")
    place = {"name": "PLUMBLINE_CHECKPOINTS", "value": "gs://bucket/kept"}
    told = {task for task in set(nodes(spec)) - GROUPS if place in container(spec, task)["env"]}
    assert told == {"base", "sft", "reward", "cost", "rl"}
    assert "PLUMBLINE_CHECKPOINTS" not in environment(compiled(tmp_path, config="demo"), "sft")


def test_the_sources_are_looked_at_on_a_cluster_before_what_reads_them_and_never_cached(tmp_path: Path) -> None:
    spec = compiled(tmp_path, "resources.sources.memory=3Gi")
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
    assert container(spec, "sources")["image"] == "plumbline/pipeline:0.1.0"
    assert container(spec, "sources")["resources"]["resourceMemoryLimit"] == "3Gi"


def test_fingerprints_enter_the_tasks_and_nothing_of_a_cluster_does_without_one(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    Compiler().compile(build(resolve([]), fingerprints={"sft": "abc"}), str(path))
    spec = yaml.safe_load(path.read_text())  # one document: nothing is asked of Kubernetes
    constants = {
        name: node["inputs"]["parameters"]["fingerprint"]["runtimeValue"]["constant"]
        for name, node in nodes(spec).items()
        if name != "passed"
    }
    assert constants.pop("sft") == "abc"
    assert set(constants.values()) == {""}
    assert "resources" not in container(spec, "sft")
    assert "notify" not in nodes(spec)
    assert not [name for name in parameters(spec) if "_" in name]


def test_another_place_than_a_cluster_puts_on_the_tasks_what_it_wants_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    Compiler().compile(build(resolve([]), equip=lambda task, node: node.set_container_image(f"here/{task}")), str(path))
    spec = yaml.safe_load(path.read_text())
    assert container(spec, "cost")["image"] == "here/cost"
    assert "notify" not in nodes(spec)
    assert not [name for name in parameters(spec) if "_" in name]


@pytest.mark.parametrize("config", ["demo", "hh", "ppo", "ppo_lag"])
def test_every_configuration_compiles(tmp_path: Path, config: str) -> None:
    assert "infer" in nodes(compiled(tmp_path, config=config))
