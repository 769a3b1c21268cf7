"""A step on several machines, against a stand-in for the cluster that runs no pods but keeps TrainJobs and logs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from components import launch, processes, storage, tracking, trainer
from components.deploy.kserve import inference_service
from components.deploy.settings import KServe
from components.errors import InputError, TrainingFailure
from components.exchange import held, visiting
from components.outbox import Outbox, Record
from components.processes import Ending, Job
from components.release import Release
from components.termination import Terminated, Watch
from components.trainjob import ACCOUNT, NODES, Nodes, PodSecret, asked_of, train_job
from definitions import objections, schema
from pipeline.overrides import resolve
from pipeline.resources import train_job_of

pytestmark = pytest.mark.tried(
    "TrainJobs and InferenceServices; a job of two machines",
    against="their resource definitions; a stand-in for the cluster, torchrun in place of pods",
)

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "tests" / "crds"
TRAINJOB = schema(CRDS / "trainer.kubeflow.org_trainjobs.yaml.gz", "v1alpha1")
JOB = Job("rl", {"seed": 1}, {"data": Path("/d"), "reward": None, "model": Path("/m")}, Path("/x/metrics.json"), "rl")
FULL = Nodes(
    image="me/train:1", exchange="gs://bucket/jobs", namespace="team", gpus=8, cpu="64", memory="1Ti", shm="64Gi",
    node_selector={"pool": "h100"}, tolerations=({"key": "gpu", "operator": "Exists"},), service_account="trains",
    variables=("HF_HOME",), image_pull_secrets=("registry",), secrets=(
        PodSecret(name="hub", env={"token": "HF_TOKEN"}), PodSecret(name="gcs", mount="/var/secrets/gcs"),
        PodSecret(name="mlflow", env={"user": "MLFLOW_TRACKING_USERNAME"}),
    ),
)  # fmt: skip


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a TrainJob changes of its runtime's pods."""
    (patch,) = manifest["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    return dict(replicated["template"]["spec"]["template"])


@pytest.mark.parametrize("asked", [FULL, Nodes(image="me/train:1", exchange="/shared", namespace="team")])
def test_the_trainjob_is_what_its_definition_accepts(asked: Nodes) -> None:
    manifest = train_job(asked, "rl-1", JOB, 4, 8)
    assert list(objections(manifest, TRAINJOB)) == []
    spec = manifest["spec"]["trainer"]
    assert (spec["numNodes"], spec["numProcPerNode"], spec["image"]) == (4, 8, "me/train:1")
    assert spec["command"][0] == "torchrun" and spec["command"][-2:] == ["-m", "components.launch"]
    assert Job.read({item["name"]: item.get("value") for item in spec["env"]}["PLUMBLINE_JOB"]) == JOB


def test_what_a_compiled_pipeline_says_of_the_pods_is_what_the_definition_accepts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = resolve(
        [],
        [
            "rl.compute.nodes=2", "exchange=gs://bucket/jobs/", "environment.HF_HOME=/cache",
            "resources.rl.node_selector={pool: h100}", "resources.rl.tolerations=[{key: gpu, operator: Exists}]",
            "secrets=[{name: hub, env: {token: HF_TOKEN}}, {name: gcs, mount: /var/secrets/gcs}]",
            "image_pull_secrets=[registry]",
        ],
    )  # fmt: skip
    monkeypatch.setenv(NODES, train_job_of(settings, "rl").model_dump_json(exclude_defaults=True))
    asked = asked_of(2).model_copy(update={"namespace": "team"})
    manifest = train_job(asked, "rl-1", JOB, 2, 1)
    assert list(objections(manifest, TRAINJOB)) == []
    assert manifest["spec"]["trainer"]["image"] == settings.images.train
    assert manifest["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod_of(manifest)["spec"]["nodeSelector"] == {"pool": "h100"}
    kept = {item["name"]: item.get("value") for item in manifest["spec"]["trainer"]["env"]}
    assert kept["PLUMBLINE_CHECKPOINTS"] == "gs://bucket/jobs/checkpoints"


def test_hardware_reaches_the_pods() -> None:
    spec = train_job(FULL, "rl-1", JOB, 2, 8)["spec"]
    limits = {"nvidia.com/gpu": "8", "cpu": "64", "memory": "1Ti"}
    assert spec["trainer"]["resourcesPerNode"] == {"requests": limits, "limits": limits}
    pod = pod_of({"spec": spec})["spec"]
    assert pod["nodeSelector"] == {"pool": "h100"} and pod["serviceAccountName"] == "trains"
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert pod["containers"][0]["volumeMounts"][0] == {"name": pod["volumes"][0]["name"], "mountPath": "/dev/shm"}


def test_secrets_reach_the_pods_by_name() -> None:
    manifest = train_job(FULL, "rl-1", JOB, 2, 8)
    pod = pod_of(manifest)["spec"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["volumes"][1]["secret"] == {"secretName": "gcs"}
    assert pod["containers"][0]["volumeMounts"][1] == {
        "name": pod["volumes"][1]["name"], "mountPath": "/var/secrets/gcs",
    }  # fmt: skip
    keys = {item["name"]: item["valueFrom"] for item in manifest["spec"]["trainer"]["env"] if "valueFrom" in item}
    assert keys == {
        "HF_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token"}},
        "MLFLOW_TRACKING_USERNAME": {"secretKeyRef": {"name": "mlflow", "key": "user"}},
    }


def test_variables_of_the_task_reach_the_pods_and_no_secret_does_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "PLUMBLINE_FINGERPRINT": "abc", "PLUMBLINE_PIPELINE_RUN": "run-1", "PLUMBLINE_MLFLOW": "optional",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_EXPERIMENT_NAME": "hh", "HF_HOME": "/cache",
    }  # fmt: skip
    kept = {
        "MLFLOW_TRACKING_PASSWORD": "s3cr3t", "MLFLOW_TRACKING_USERNAME": "s3cr3t", "HF_TOKEN": "s3cr3t",
        "PLUMBLINE_RUN_DIR": "s3cr3t", NODES: "s3cr3t",
    }  # fmt: skip
    for name, value in (given | kept).items():
        monkeypatch.setenv(name, value)
    manifest = train_job(FULL, "rl-1", JOB, 2, 8)
    items = manifest["spec"]["trainer"]["env"]
    assert given.items() <= {item["name"]: item.get("value") for item in items}.items()
    assert "s3cr3t" not in str(manifest)
    assert len({item["name"] for item in items}) == len(items)


def test_pods_run_as_our_images_user_under_the_tasks_account_without_istios_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ACCOUNT, "default-editor")
    asked = Nodes(image="me/train:1", exchange="/shared", namespace="team")
    pod = pod_of(train_job(asked, "rl-1", JOB, 2, 1))
    assert pod["spec"] == {
        "securityContext": {"runAsUser": 10001, "runAsNonRoot": True}, "serviceAccountName": "default-editor",
    }  # fmt: skip
    assert pod["metadata"] == {"labels": {"sidecar.istio.io/inject": "false"}}
    assert pod_of(train_job(FULL, "rl-1", JOB, 2, 1))["spec"]["serviceAccountName"] == "trains"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("spec", "trainer", "numNodes"), -1, ".spec.trainer.numNodes: -1 is less than the minimum of 0"),
        (("spec", "trainer", "numNodes"), "2", ".spec.trainer.numNodes: '2' is not of type 'integer'"),
        (("spec", "trainer", "nodes"), 2, ".spec.trainer: Additional properties are not allowed ('nodes'"),
        (("spec", "runtimeRef"), {}, ".spec.runtimeRef: 'name' is a required property"),
        (("spec", "trainer", "env", 0, "value"), 3, ".spec.trainer.env[0].value: 3 is not of type 'string'"),
        (("spec", "trainer", "resourcesPerNode", "limits", "cpu"), "many", ".spec.trainer.resourcesPerNode.limits.cpu"),
    ],
)
def test_what_the_definition_refuses_is_found(path: tuple[Any, ...], value: Any, words: str) -> None:
    manifest: Any = json.loads(json.dumps(train_job(FULL, "rl-1", JOB, 4, 8)))
    place = manifest
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (found,) = objections(manifest, TRAINJOB)
    assert found.startswith(words)


def test_the_inference_service_is_what_its_definition_accepts() -> None:
    definition = schema(CRDS / "serving.kserve.io_inferenceservices.yaml.gz", "v1beta1")
    release = Release("tiny", "1", "gs://bucket/tiny/1", "0" * 64)
    for settings in (KServe(), KServe(gpus=2, service_account="reader", min_replicas=0)):
        manifest = inference_service(settings, release)
        assert list(objections(manifest, definition)) == []
        manifest["spec"]["predictor"]["containers"][0]["ports"][0]["containerPort"] = "8080"
        assert len(list(objections(manifest, definition))) == 1


class Cluster(BaseHTTPRequestHandler):
    """As much of Kubernetes as a TrainJob meets; what the pods would do is done when one is created."""

    jobs: dict[str, Any]
    deleted: list[str]
    refuse: int
    pods: Any
    log: bytes = b"progress rl 1/2\nprogress rl 2/2\n"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuse:
            self.reply(self.refuse, {"message": "not allowed"})
            return
        self.jobs[body["metadata"]["name"]] = body
        threading.Thread(target=self.pods, args=(body,), daemon=True).start()
        self.reply(201, body)

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if path.path.endswith("/log"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.log)
        elif path.path.endswith("/pods"):
            pod = {"metadata": {"name": "rl-node-0-0"}, "status": {"phase": "Running"}}
            self.reply(200, {"items": [pod]})
        elif (name := path.path.rsplit("/", 1)[1]) in self.jobs:
            self.reply(200, self.jobs[name])
        else:
            self.reply(404, {"message": "not found"})

    def do_DELETE(self) -> None:
        name = urlsplit(self.path).path.rsplit("/", 1)[1]
        self.deleted.append(name)
        self.jobs.pop(name, None)
        self.reply(200, {})

    def reply(self, status: int, value: Any) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Cluster]]:
    handler = type("Handler", (Cluster,), {"jobs": {}, "deleted": [], "refuse": 0, "pods": lambda self, body: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "test", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig), "utf-8")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    exchange = {"image": "me/train:1", "exchange": str(tmp_path / "exchange"), "namespace": "team"}
    monkeypatch.setenv(NODES, json.dumps(exchange))
    monkeypatch.setattr(trainer, "POLL_S", 0.01)
    yield handler
    server.shutdown()
    server.server_close()


def ends(kind: str = "done", message: str = "", condition: str = "Complete") -> Any:
    """What pods do: two processes that end so, the first of which writes a result where it ends well."""

    def pods(handler: Any, body: dict[str, Any]) -> None:
        variables = {item["name"]: item.get("value") for item in body["spec"]["trainer"]["env"]}
        place = Path(Job.read(variables["PLUMBLINE_JOB"]).exchange)
        assert (place / "data" / "rows.txt").read_text("utf-8") == "rows"
        for rank in (0, 1):
            ending = Ending(rank, kind, message, float(rank))  # type: ignore[arg-type]
            storage.put_text(json.dumps(asdict(ending)), f"{variables['PLUMBLINE_ENDINGS']}/{rank}.json")
        if kind == "done":
            for name, file in (("output", "weights.txt"), ("metrics", "metrics.json")):
                (place / name).mkdir()
                (place / name / file).write_text("{}", "utf-8")
        body["status"] = {"conditions": [{"type": condition, "status": "True"}]}

    return pods


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("rows", "utf-8")
    paths = {"data": tmp_path / "data", "cost": None, "model": tmp_path / "model"}
    return Job("rl", {}, paths, tmp_path / "metrics" / "metrics.json", "rl")


@pytest.fixture
def a_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_RANK", "0"), ("TMPDIR", str(tmp_path / "scratch"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()


def test_a_trainjob_is_made_followed_and_deleted_and_its_result_brought_back(
    tmp_path: Path, cluster: type[Cluster], job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.pods = ends()
    trainer.run(job, nodes=2, processes=1)
    assert (tmp_path / "model" / "weights.txt").exists() and job.metrics_file.exists()
    assert "progress rl 2/2" in capsys.readouterr().out
    assert len(cluster.deleted) == 1 and not cluster.jobs
    assert not list((tmp_path / "exchange").iterdir())


@pytest.mark.parametrize(
    ("kind", "message", "error", "words"),
    [
        ("input", "rl.k is 3", InputError, "^rl.k is 3$"),
        ("training", "skipped", TrainingFailure, "^process 1 of 2: skipped"),
    ],
)
def test_the_failure_of_a_process_is_the_step_s(
    tmp_path: Path, cluster: type[Cluster], job: Job, kind: str, message: str, error: type[Exception], words: str
) -> None:
    cluster.pods = ends(kind, message, "Failed")
    with pytest.raises(error, match=words):
        trainer.run(job, nodes=2, processes=1)
    assert len(cluster.deleted) == 1
    assert not list((tmp_path / "exchange").iterdir())


def test_pods_that_end_without_a_word_are_a_failure(cluster: type[Cluster], job: Job) -> None:
    def pods(handler: Any, body: dict[str, Any]) -> None:
        body["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}

    cluster.pods = pods
    with pytest.raises(TrainingFailure, match="process 1 of 2 ended without a word"):
        trainer.run(job, nodes=2, processes=1)


def test_sigterm_deletes_the_trainjob(tmp_path: Path, cluster: type[Cluster], job: Job) -> None:
    cluster.pods = lambda handler, body: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        trainer.run(job, nodes=2, processes=1)
    assert len(cluster.deleted) == 1 and not cluster.jobs
    assert not list((tmp_path / "exchange").iterdir())


def test_a_trainjob_that_somebody_deletes_is_a_failure(cluster: type[Cluster], job: Job) -> None:
    cluster.pods = lambda handler, body: cluster.jobs.clear()
    with pytest.raises(TrainingFailure, match="was deleted while it ran"):
        trainer.run(job, nodes=2, processes=1)


def test_a_refusal_names_its_reason_and_the_next_move(cluster: type[Cluster], job: Job) -> None:
    cluster.refuse = 403
    with pytest.raises(InputError, match=r"refused the TrainJob \(403: not allowed\)\. Allow this account to create"):
        trainer.run(job, nodes=2, processes=1)


def test_a_cluster_out_of_reach_is_given_up_after_a_while(
    cluster: type[Cluster], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PATIENCE_S", 0.05)

    def broken(self: Any) -> None:
        self.reply(503, {"message": "down"})

    cluster.do_GET = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingFailure, match="the cluster does not show TrainJob rl-"):
        trainer.run(job, nodes=2, processes=1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "PLUMBLINE_TRAINJOB is not set"),
        ("{", "PLUMBLINE_TRAINJOB is no JSON"),
        ('{"image": "a"}', r"PLUMBLINE_TRAINJOB\.exchange is missing"),
        ('{"image": "a", "exchange": "b", "gpu": 1}', r"PLUMBLINE_TRAINJOB\.gpu is unknown"),
    ],
)
def test_what_is_not_said_of_the_pods_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str | None, words: str
) -> None:
    monkeypatch.delenv(NODES, raising=False)
    if value is not None:
        monkeypatch.setenv(NODES, value)
    with pytest.raises(InputError, match=words):
        trainer.run(JOB, nodes=2, processes=1)


@pytest.mark.usefixtures("a_first_process")
def test_inputs_and_results_pass_through_the_exchange(tmp_path: Path, store: str, job: Job) -> None:
    with held(job, f"{store}/rl-1", Watch()) as laid_out, visiting(Job.read(laid_out.written())) as there:
        data, model = there.paths["data"], there.paths["model"]
        assert data is not None and model is not None and there.paths["cost"] is None
        assert (data / "rows.txt").read_text("utf-8") == "rows"
        for file in (model / "weights.txt", there.metrics_file):
            file.parent.mkdir(parents=True)
            file.write_text(file.name, "utf-8")
    assert (tmp_path / "model" / "weights.txt").read_text("utf-8") == "weights.txt"
    assert job.metrics_file.read_text("utf-8") == "metrics.json"
    assert storage.list_names(f"{store}/rl-1") == []


@pytest.mark.usefixtures("a_first_process")
def test_a_failed_jobs_numbers_are_brought_and_nothing_is_left_behind(tmp_path: Path, store: str, job: Job) -> None:
    def trained() -> None:
        with held(job, f"{store}/rl-1", Watch()) as laid_out, visiting(Job.read(laid_out.written())) as there:
            there.metrics_file.parent.mkdir(parents=True)
            (there.metrics_file.parent / "metrics.jsonl").write_text("row", "utf-8")
            raise TrainingFailure("nan")

    with pytest.raises(TrainingFailure, match=r"^nan$"):
        trained()
    assert (job.metrics_file.parent / "metrics.jsonl").read_text("utf-8") == "row"
    assert not (tmp_path / "model").exists()
    assert storage.list_names(f"{store}/rl-1") == []


@pytest.mark.usefixtures("a_first_process")
def test_a_failure_before_any_number_is_told_as_it_is(tmp_path: Path, job: Job) -> None:
    with (
        pytest.raises(InputError, match=r"^rl\.k is 3$"),
        held(job, str(tmp_path / "exchange"), Watch()) as laid_out,
        visiting(laid_out),
    ):
        raise InputError("rl.k is 3")
    assert not (tmp_path / "exchange").exists()


def test_where_paths_are_everybody_s_nothing_is_fetched(job: Job) -> None:
    with visiting(job) as there:
        assert there is job


@pytest.mark.usefixtures("a_first_process")
def test_what_mlflow_was_not_told_in_the_pods_can_be_told_from_the_tasks_folder(tmp_path: Path, job: Job) -> None:
    told: list[tuple[str, ...]] = []

    class Run:
        def log_artifacts(self, path: str, under: str) -> None:
            told.append(((Path(path) / "report.html").read_text("utf-8"), under))

    record = Record(address="http://mlflow", name="rl", start="s")
    with held(job, str(tmp_path / "exchange"), Watch()) as laid_out, visiting(laid_out) as there:
        folder, model = there.metrics_file.parent, there.paths["model"]
        assert model is not None
        for file in (folder / "report" / "report.html", model / "weights.txt"):
            file.parent.mkdir(parents=True)
            file.write_text("page", "utf-8")
        tracking.Tracker(folder, Outbox(folder, record, None)).log_artifacts(folder / "report")
        (folder / "unsent.json").write_text(record.model_dump_json(), "utf-8")
    storage.remove(str(folder))  # no pod outlives its job
    own = job.metrics_file.parent
    run: Any = Run()
    Outbox(own, Record.read(own), run).deliver()
    assert told == [("page", "report")]


@pytest.mark.parametrize(
    ("compute", "variable", "nodes"),
    [({"nodes": 2}, "", 2), ({"nodes": 1}, "{}", 1), ({"nodes": 3, "processes": 8}, "{}", 3)],
)
def test_a_task_that_watches_a_trainjob_tracks_nothing_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: dict[str, int], variable: str, nodes: int
) -> None:
    asked: list[int] = []

    def run(job: Job, nodes: int, processes: int) -> None:
        asked.append(nodes)
        job.metrics_file.write_text('{"loss": 1.5}', "utf-8")
        (job.metrics_file.parent / "metrics.jsonl").write_text("row", "utf-8")

    monkeypatch.setattr(trainer, "run", run)
    monkeypatch.setattr(processes, "run", None)
    monkeypatch.setattr(tracking, "track", None)
    monkeypatch.delenv(NODES, raising=False)
    if variable:
        monkeypatch.setenv(NODES, variable)
    settings = {"training": {"compute": compute}}
    values = launch.run_step("sft", settings, {}, metrics_file=tmp_path / "metrics", task="sft")
    assert (values, asked) == ({"loss": 1.5}, [nodes])
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == "row"


def test_a_process_of_a_trainjob_with_one_node_runs_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(launch, "step_function", lambda step: lambda settings, **paths: {"loss": 2.0})
    values = launch.run_step("sft", {}, {}, metrics_file=tmp_path / "metrics", task="sft")
    assert values == {"loss": 2.0}


def machines(place: Path) -> Any:
    """What pods do, really: each runs the TrainJob's command, with its variables and what Trainer adds to them."""

    def pods(handler: Any, body: dict[str, Any]) -> None:
        asked = body["spec"]["trainer"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for node in range(asked["numNodes"]):
            (place / f"pod-{node}").mkdir()
            variables = {item["name"]: item["value"] for item in asked["env"]} | {
                "PET_NNODES": str(asked["numNodes"]), "PET_NPROC_PER_NODE": str(asked["numProcPerNode"]),
                "PET_NODE_RANK": str(node), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                "TMPDIR": str(place / f"pod-{node}"), "HOME": str(place / f"pod-{node}"), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-m", "torch.distributed.run", *asked["command"][1:]]
            started.append(subprocess.Popen([*command[:3], "--local-addr=127.0.0.1", *command[3:]], env=variables))
        fine = [process.wait() == 0 for process in started]
        body["status"] = {"conditions": [{"type": "Complete" if all(fine) else "Failed", "status": "True"}]}

    return pods


def test_two_machines_train_and_the_first_process_tracks_below_the_pipelines_run(
    tmp_path: Path, cluster: type[Cluster], policy_folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.pods = machines(tmp_path)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    variables = {"TRACKING_URI": address, "EXPERIMENT_NAME": "hh"}
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    monkeypatch.setenv("PLUMBLINE_PIPELINE_RUN", "run-1")
    training = {"epochs": 1, "max_length": 64, "batch_tokens": 512, "compute": {"nodes": 2, "dtype": "fp32"}}
    paths = {"data": data_folder, "base": policy_folder, "model": tmp_path / "task" / "model"}
    metrics_file = tmp_path / "task" / "metrics"
    values = launch.run_step("sft", {"training": training}, paths, metrics_file=metrics_file, task="sft")
    assert values == json.loads(metrics_file.read_text("utf-8"))
    assert (tmp_path / "task" / "model" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "task" / "metrics.jsonl").read_text("utf-8").splitlines()]
    from mlflow import MlflowClient

    client = MlflowClient(address)
    (experiment,) = [found for found in client.search_experiments() if found.name == "hh"]
    below, whole = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.run_name == "run-1")
    assert below.data.tags["mlflow.parentRunId"] == whole.info.run_id and below.info.status == "FINISHED"
    logged = {name for row in rows for name in row} - {"update", "time"}
    assert logged and logged <= set(below.data.metrics)
    for name in logged:
        points = [point.step for point in client.get_metric_history(below.info.run_id, name)]
        expected = [row["update"] for row in rows if name in row]
        assert sorted(points) == sorted(expected + ([max(r["update"] for r in rows)] if name in values else []))
