"""What a step of a run printed: from a local run's log, or from its pod on a cluster.

The v2beta1 API has no logs. The API server gives a pod's at /apis/v1alpha1/runs/{run}/nodes/{pod}/log, and the
server of Kubeflow's pages at /k8s/pod/logs; which of them is there depends on what stands behind the host. Both want a
pod's name, and give a pod's log as long as the pod is there, or where logs are archived.
"""

from components.errors import InputError
from pipeline import details
from pipeline.cluster import Cluster
from pipeline.pods import pod_names
from pipeline.runs import RunFolder

HEADING = "=== "


def local_log(folder: RunFolder, step: str) -> str:
    """What a step printed in a local run. Raises InputError when it did not run there."""
    if not folder.log.is_file():
        raise InputError(f"{folder.path}: no log.txt in this folder; name a run by its id, or latest.")
    sections: dict[str, list[str]] = {}
    name = ""
    for line in folder.log.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith(HEADING):
            name = line.removeprefix(HEADING).strip()
        sections.setdefault(name, []).append(line)
    if step in sections:
        return "".join(sections[step][1:])
    if (how := folder.recorded(step).get("status")) == "cached":
        raise InputError(f"{step} was taken from the cache in run {folder.run_id} and printed nothing.")
    ran = ", ".join(name for name in sections if name)
    raise InputError(f"{step!r} did not run in {folder.run_id}{f' ({how})' if how else ''}; those that did: {ran}.")


def cluster_log(cluster: Cluster, run_id: str, step: str) -> str:
    """What a step's pod printed in a run on a cluster.

    Raises InputError for a step that the run has not or that did not start, and with the commands that ask
    Kubernetes itself when the host gives no log.
    """
    run = cluster.run(run_id)
    spec = cluster.spec(run)
    names = list(details.task_names(spec).values())
    if step not in names:
        raise InputError(f"run {run_id} has no step {step!r}; accepted: {', '.join(names)}.")
    for pod in pod_names(run, spec, step):
        text = cluster.pod_log(run_id, pod)
        if text is not None:
            return text
    (how,) = (result.status for result in details.results(run, spec) if result.task == step)
    if how in ("waiting", "skipped"):
        raise InputError(f"{step} has not started in run {run_id} ({how}): there is no log.")
    raise InputError(
        f"{cluster.connection.host} gives no log of {step}: it was cached, its pod is gone, or the host has no logs. "
        f"Ask Kubernetes:\n{_commands(cluster.connection.namespace or 'kubeflow', run_id)}"
    )


def _commands(namespace: str, run_id: str) -> str:
    """What lists a run's pods with the steps they belong to, and what prints one's log."""
    columns = r"POD:.metadata.name,STEP:.metadata.annotations.workflows\.argoproj\.io/node-name"
    return (
        f"  kubectl -n {namespace} get pods -l pipeline/runid={run_id} -o custom-columns='{columns}'\n"
        f"  kubectl -n {namespace} logs POD -c main"
    )
