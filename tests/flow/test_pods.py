"""The pods that a compiled pipeline asks for are pods that Kubernetes accepts: kubernetes-validate, strictly."""

from typing import Any

import kubernetes_validate
import pytest
import yaml

from kubeflow_driver import pod
from pipeline.overrides import resolve
from pipeline.package import compiled

pytestmark = pytest.mark.tried(
    "pods of the compiled pipeline",
    against="Kubernetes' schemas (kubernetes-validate); a stand-in for Kubeflow's driver",
)

EVERYTHING = (
    "resources.rl.gpus=8", "resources.rl.node_selector={pool: h100}", "resources.rl.timeout_s=7200",
    "resources.rl.tolerations=[{key: gpu, operator: Exists, effect: NoSchedule}, {operator: Exists}]",
    "secrets=[{name: hub, env: {token: HF_TOKEN}, tasks: [base, rl]}, {name: gcs, mount: /var/secrets/gcs}]",
    "image_pull_secrets=[registry]", "environment.GOOGLE_APPLICATION_CREDENTIALS=/var/secrets/gcs/key.json",
    "checkpoints=gs://bucket/kept",
)  # fmt: skip
SEVERAL = (*EVERYTHING, "rl.compute.nodes=2", "exchange=gs://bucket/jobs")
VERSION = "1.31"


def pods(*overrides: str, **chosen: Any) -> dict[str, dict[str, Any]]:
    """The pod of every executor of the compiled pipeline, in a run that chooses these parameters."""
    spec, beyond = yaml.load_all(compiled(resolve(["default"], overrides)), yaml.CSafeLoader)
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    run = {name: parameter["defaultValue"] for name, parameter in parameters.items()} | chosen
    return {label: pod(spec, beyond, label, run) for label in spec["deploymentSpec"]["executors"]}


@pytest.mark.parametrize("overrides", [(), EVERYTHING, SEVERAL], ids=["default", "everything", "several machines"])
def test_kubernetes_accepts_the_pod_of_every_task(overrides: tuple[str, ...]) -> None:
    found = pods(*overrides)
    assert len(found) == 13
    for manifest in found.values():
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_a_run_that_chooses_other_hardware_gets_that_pod() -> None:
    made = pods(*EVERYTHING, rl_gpus="4", rl_node_selector={"pool": "a100"}, rl_tolerations=[], rl_memory="1Ti")
    manifest = made["exec-rl"]
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    asked = manifest["spec"]
    assert asked["containers"][0]["resources"]["limits"] == {"cpu": "16", "memory": "1Ti", "nvidia.com/gpu": "4"}
    assert (asked["nodeSelector"], asked["tolerations"]) == ({"pool": "a100"}, [])
    names = {variable["name"] for variable in asked["containers"][0]["env"]}
    assert {"HF_TOKEN", "PLUMBLINE_CHECKPOINTS", "PLUMBLINE_PIPELINE_RUN", "MLFLOW_EXPERIMENT_NAME"} <= names
    assert asked["imagePullSecrets"] == [{"name": "registry"}] and asked["activeDeadlineSeconds"] == 7200


def test_what_kubernetes_does_not_know_is_objected_to() -> None:
    manifest = pods()["exec-rl"]
    manifest["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="limit"):
        kubernetes_validate.validate(manifest, VERSION, strict=True)
