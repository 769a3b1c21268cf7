"""The pod that Kubeflow's driver makes of a task of a compiled pipeline, as far as the pipeline decides it.

Without a cluster this stands in for backend/src/v2/driver: placeholders and references become the run's parameters, and
what the platform part asks becomes fields of the pod.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

PARAMETER = re.compile(r"\{\{\$\.inputs\.parameters\['(?:pipelinechannel--)?(.+?)'\]\}\}")


def pod(spec: Mapping[str, Any], beyond: Mapping[str, Any], label: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the pod of an executor, in a run with these parameters; `beyond` is the second document."""
    container = spec["deploymentSpec"]["executors"][label]["container"]
    asked = beyond["platforms"]["kubernetes"]["deploymentSpec"]["executors"][label]
    mounts, volumes = zip(*_volumes(asked), strict=True) if list(_volumes(asked)) else ((), ())
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": label, "labels": {"pipeline/runid": "a-run"}},
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "main",
                    "image": _filled(container["image"], run),
                    "command": container["command"],
                    "args": container["args"],
                    "env": [*container.get("env", []), *_variables(asked)],
                    "resources": {"limits": dict(_limits(container["resources"], run))},
                    "volumeMounts": list(mounts),
                    "securityContext": {name: _number(value) for name, value in asked["securityContext"].items()},
                }
            ],
            "volumes": list(volumes),
            "nodeSelector": _value(asked.get("nodeSelector", {}).get("nodeSelectorJson"), run) or {},
            "tolerations": [
                toleration
                for entry in asked.get("tolerations", [])
                for toleration in _listed(_value(entry["tolerationJson"], run))
            ],
            "imagePullSecrets": [{"name": entry["secretName"]} for entry in asked.get("imagePullSecret", [])],
            **({"activeDeadlineSeconds": int(limit)} if (limit := asked.get("activeDeadlineSeconds")) else {}),
        },
    }


def _limits(resources: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "cpu", _filled(resources["resourceCpuLimit"], run)
    yield "memory", _filled(resources["resourceMemoryLimit"], run)
    if accelerator := resources.get("accelerator"):
        yield _filled(accelerator["resourceType"], run), _filled(accelerator["resourceCount"], run)


def _variables(asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for field in asked.get("fieldPathAsEnv", []):
        yield {"name": field["name"], "valueFrom": {"fieldRef": {"fieldPath": field["fieldPath"]}}}
    for secret in asked.get("secretAsEnv", []):
        for key in secret["keyToEnv"]:
            reference = {"name": secret["secretName"], "key": key["secretKey"], "optional": secret["optional"]}
            yield {"name": key["envVar"], "valueFrom": {"secretKeyRef": reference}}


def _volumes(asked: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Where each volume is mounted, and what it is."""
    for secret in asked.get("secretAsVolume", []):
        held = {"secretName": secret["secretName"], "optional": secret["optional"]}
        yield {"name": secret["secretName"], "mountPath": secret["mountPath"]}, {
            "name": secret["secretName"],
            "secret": held,
        }
    for empty in asked.get("emptyDirMounts", []):
        held = {"medium": empty["medium"], "sizeLimit": empty["sizeLimit"]}
        yield {"name": empty["volumeName"], "mountPath": empty["mountPath"]}, {
            "name": empty["volumeName"],
            "emptyDir": held,
        }


def _filled(text: str, run: Mapping[str, Any]) -> str:
    return PARAMETER.sub(lambda match: str(run[match[1]]), text)


def _value(reference: Any, run: Mapping[str, Any]) -> Any:
    match reference:
        case {"componentInputParameter": name}:
            return run[name.removeprefix("pipelinechannel--")]
        case {"runtimeValue": {"constant": constant}}:
            return constant
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value
