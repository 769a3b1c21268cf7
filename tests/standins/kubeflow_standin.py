"""A stand-in for the API server of Kubeflow Pipelines: v2beta1 over HTTP, in memory.

It takes what kfp_server_api's models say a request may hold, and refuses what the API server refuses, with the same
codes: unknown fields, wrong enums, what does not exist, bad cron, a missing token. Pipelines are parsed with Kubeflow's
own protobuf. Runs stay pending until a test lets `engine` execute them; nothing is executed really.
"""

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from kubeflow_engine import Engine, nodes

CRON_FIELDS = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
NAMES = re.compile("jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|sun|mon|tue|wed|thu|fri|sat", re.IGNORECASE)
OPERATIONS = {"EQUALS", 1}
TYPES: dict[str, type | tuple[type, ...]] = {
    "str": (str, int), "bool": bool, "int": int, "object": object, "datetime": str,
}  # fmt: skip
"""What JSON may hold for a type of the models; 64-bit numbers are strings there, and numbers are taken too."""


class Refusal(Exception):
    """An answer other than success; with code 0, none at all."""

    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message


def check(kind: str, value: Any, at: str) -> None:
    """Refuse a value that a message of this type cannot hold, as the API's JSON parser does."""
    if kind.startswith("list["):
        for item in value:
            check(kind[5:-1], item, at)
    elif kind.startswith("dict("):
        for key, item in value.items():
            check(kind[:-1].split(", ")[1], item, f"{at}.{key}")
    elif kind in TYPES:
        if not isinstance(value, TYPES[kind]):
            raise Refusal(400, f"proto: invalid value for field {at}: {value!r}")
    else:
        check_message(getattr(kfp_server_api, kind), value, at)


def check_message(model: Any, value: Any, at: str) -> None:
    """Refuse what is no message of this model, or none of the values of an enum."""
    if not model.openapi_types:
        if value not in model.allowable_values:
            raise Refusal(400, f"proto: invalid value for enum field {at}: {value!r}")
        return
    known = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    for name, item in value.items():
        if name not in known:
            raise Refusal(400, f'proto: unknown field "{name}" in {at}')
        check(known[name], item, f"{at}.{name}")


def check_cron(cron: str) -> None:
    """Refuse what the cron library of the API server cannot parse; it takes five fields for those without a weekday."""
    fields = cron.split()
    if len(fields) not in (5, 6):
        raise Refusal(400, f"Schedule cron is not a supported format. Error: Expected 5 to 6 fields, found {fields}")
    for field, (low, high) in zip(fields, CRON_FIELDS, strict=False):
        for number in re.findall(r"(?<!/)\b\d+\b", field):
            if not low <= int(number) <= high:
                raise Refusal(400, f"Schedule cron is not a supported format. Error: {number} outside {low}-{high}")
        for word in re.findall(r"[A-Za-z]+", field):
            if not NAMES.fullmatch(word):
                raise Refusal(400, f"Schedule cron is not a supported format. Error: {word}")


class KubeflowStandIn:
    """The state behind the API, and what tests ask of it."""

    def __init__(self, token: str = "", namespace: str = "") -> None:
        self.token, self.namespace = token, namespace
        """Without a namespace the installation has one user; with one, only this namespace is allowed."""
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.pod_logs: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.failures: list[int] = []
        """Codes with which the next requests are answered."""
        self.looks: list[Callable[[str], Any]] = []
        """What happens before the next answers about a run, one each time: the run goes on while it is watched."""
        self.engine = Engine()
        self.url = ""

    def execute(self, run_id: str, **outcome: Any) -> dict[str, str]:
        """Let a run end; how each task did: ran, cached, failed or skipped."""
        run = self.runs[run_id]
        done = self.engine.execute(self.spec(run), run.get("runtime_config", {}).get("parameters", {}), **outcome)
        ended = "FAILED" if "failed" in done.values() else "SUCCEEDED"
        run.update(state=ended, finished_at=now(), run_details={"task_details": nodes(self.spec(run), run_id, done)})
        return done

    def progress(self, run_id: str, **states: str) -> None:
        """Let a run go on: tasks that ran, are running, were cached or failed."""
        run = self.runs[run_id]
        run.update(state="RUNNING", run_details={"task_details": nodes(self.spec(run), run_id, states)})

    def trigger(self, schedule_id: str) -> str:
        """Start a run of a schedule, as its controller does when the time has come; the run's id."""
        schedule = self.schedules[schedule_id]
        kept = ("experiment_id", "pipeline_version_reference", "runtime_config", "service_account")
        body = {name: schedule[name] for name in kept if name in schedule}
        return str(self.create_run({**body, "display_name": f"{schedule['display_name']} run"})["run_id"])

    def spec(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The compiled pipeline of a run."""
        return pipeline_spec(self.versions[run["pipeline_version_reference"]["pipeline_version_id"]])

    @contextmanager
    def serving(self) -> Iterator["KubeflowStandIn"]:
        """The stand-in, answering at `url` meanwhile."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"api": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    # --- what the API does ---

    def create_experiment(self, body: dict[str, Any]) -> dict[str, Any]:
        check("V2beta1Experiment", body, "experiment")
        return self._add(self.experiments, "experiment_id", body)

    def create_pipeline(self, body: dict[str, Any]) -> dict[str, Any]:
        check("V2beta1Pipeline", body, "pipeline")
        return self._add(self.pipelines, "pipeline_id", body)

    def upload_version(self, query: Mapping[str, str], package: str) -> dict[str, Any]:
        if query.get("pipelineid") not in self.pipelines:
            raise Refusal(400, "Failed to create a pipeline version")
        spec, *platform = yaml.load_all(package, yaml.CSafeLoader)
        try:
            json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        except json_format.ParseError as error:
            raise Refusal(400, f"invalid v2 pipeline spec: {error}") from None
        body = {"pipeline_id": query["pipelineid"], "display_name": query["name"]}
        if any(
            version["display_name"] == query["name"] and version["pipeline_id"] == query["pipelineid"]
            for version in self.versions.values()
        ):
            raise Refusal(409, f"pipeline version {query['name']} already exists")
        body["pipeline_spec"] = {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec
        return self._kept(self.versions, "pipeline_version_id", body)

    def create_run(self, body: dict[str, Any]) -> dict[str, Any]:
        check("V2beta1Run", body, "run")
        self._check_source(body)
        return self._kept(self.runs, "run_id", {**body, "state": "PENDING"})

    def create_schedule(self, body: dict[str, Any]) -> dict[str, Any]:
        check("V2beta1RecurringRun", body, "recurring_run")
        self._check_source(body)
        if body.get("mode") not in ("ENABLE", "DISABLE"):
            raise Refusal(400, "Recurring run mode is unspecified")
        if not 1 <= int(body.get("max_concurrency", 0)) <= 10:
            raise Refusal(400, f"The max concurrency is out of range. Support 1-10. Received {body}")
        trigger = body.get("trigger", {})
        if "cron_schedule" in trigger:
            check_cron(trigger["cron_schedule"]["cron"])
        elif int(trigger.get("periodic_schedule", {}).get("interval_second", 0)) < 1:
            raise Refusal(400, "Found invalid period schedule interval. Set at interval to least 1 second.")
        status = "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"
        return self._kept(self.schedules, "recurring_run_id", {**body, "status": status})

    def listed(self, kept: Mapping[str, dict[str, Any]], query: Mapping[str, str]) -> tuple[list[Any], str]:
        """A page of what matches the filter, two at a time however many were asked for, and the next page's token."""
        if self.namespace and query.get("namespace") != self.namespace and kept is not self.versions:
            raise Refusal(403, f"User has no access to namespace {query.get('namespace')!r}")
        if not self.namespace and query.get("namespace"):
            raise Refusal(400, "In single-user mode a namespace cannot be given")
        found = [item for item in kept.values() if _matches(item, query.get("filter", ""))]
        if kept is self.versions:
            found = [item for item in found if item["pipeline_id"] == query["pipeline_id"]]
        start = int(query.get("page_token") or 0)
        return found[start : start + 2], str(start + 2) if len(found) > start + 2 else ""

    def _check_source(self, body: dict[str, Any]) -> None:
        """Refuse what names no experiment, no version or parameters that the pipeline has not."""
        if not body.get("display_name"):
            raise Refusal(400, "The run name is empty. Please specify a valid name")
        if body.get("experiment_id") not in self.experiments:
            raise Refusal(404, f"Experiment {body.get('experiment_id')} not found")
        reference = body.get("pipeline_version_reference")
        if not reference:
            raise Refusal(400, "Failed to fetch a template with an empty pipeline spec manifest")
        version = self.versions.get(reference.get("pipeline_version_id", ""))
        if version is None or version["pipeline_id"] != reference.get("pipeline_id"):
            raise Refusal(404, f"PipelineVersion {reference.get('pipeline_version_id')} not found")
        known = pipeline_spec(version)["root"].get("inputDefinitions", {}).get("parameters", {})
        for name, value in body.get("runtime_config", {}).get("parameters", {}).items():
            if name not in known:
                raise Refusal(400, f"parameter {name} is not an input of the pipeline")
            if known[name]["parameterType"] == "STRUCT" and not isinstance(value, dict):
                raise Refusal(400, f"input parameter {name} requires type struct")

    def _add(self, kept: dict[str, Any], key: str, body: dict[str, Any]) -> dict[str, Any]:
        """Keep something with a name of its own."""
        if not body.get("display_name"):
            raise Refusal(400, "name is empty")
        if self.namespace != body.get("namespace", ""):
            raise Refusal(403 if self.namespace else 400, f"namespace {body.get('namespace')!r} is not yours")
        if any(item["display_name"] == body["display_name"] for item in kept.values()):
            raise Refusal(409, f"{body['display_name']} already exists")
        return self._kept(kept, key, body)

    def _kept(self, kept: dict[str, Any], key: str, body: dict[str, Any]) -> dict[str, Any]:
        made = {**body, key: str(uuid.uuid4()), "created_at": now()}
        kept[made[key]] = made
        return made


def pipeline_spec(version: Mapping[str, Any]) -> dict[str, Any]:
    """The compiled pipeline of a version; what it asks of Kubernetes lies beside it."""
    found = version["pipeline_spec"]
    return dict(found.get("pipeline_spec", found))


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _matches(item: Mapping[str, Any], text: str) -> bool:
    """Whether an item passes a filter of predicates on display_name."""
    for predicate in json.loads(text)["predicates"] if text else ():
        if predicate.get("operation") not in OPERATIONS or predicate.get("key") != "display_name":
            raise Refusal(400, f"Invalid filter predicate {predicate}")
        if item["display_name"] != predicate["string_value"]:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    """HTTP on one side, the stand-in's methods on the other."""

    api: KubeflowStandIn

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_DELETE(self) -> None:
        self._answer(lambda path, query: self._one(self.api.schedules, path.split("/")[-1], remove=True) and {})

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, respond: Any) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.api.asked.append((self.command, path))
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.api.failures:
                raise Refusal(self.api.failures.pop(0), "upstream connect error")
            if self.api.token and self.headers.get("authorization") != f"Bearer {self.api.token}":
                raise Refusal(401, f"no valid identity in {self.headers.get('authorization')}")
            answer = respond(path, query)
            code, kind = 200, "text/plain" if isinstance(answer, str) else "application/json"
        except Refusal as refusal:
            if not refusal.code:  # the connection ends without an answer
                return
            code, kind = refusal.code, "application/json"
            answer = {"error": refusal.message, "code": 3, "message": refusal.message, "details": []}
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _get(self, path: str, query: dict[str, str]) -> Any:
        api = self.api
        match path.removeprefix("/apis/").split("/"):
            case ["v2beta1", "healthz"]:
                return {"multi_user": bool(api.namespace), "pipeline_store": "database"}
            case ["v1alpha1", "runs", _, "nodes", pod, "log"]:
                if pod not in api.pod_logs:
                    raise Refusal(500, f"Failed to read logs from pod {pod}")
                return api.pod_logs[pod]
            case ["v2beta1", ("experiments" | "pipelines" | "recurringruns") as field]:
                kept = {"experiments": api.experiments, "pipelines": api.pipelines, "recurringruns": api.schedules}
                return self._page({"recurringruns": "recurringRuns"}.get(field, field), kept[field], query)
            case ["v2beta1", "pipelines", pipeline, "versions"]:
                return self._page("pipeline_versions", api.versions, {**query, "pipeline_id": pipeline})
            case ["v2beta1", "pipelines", _, "versions", version]:
                return self._one(api.versions, version)
            case ["v2beta1", "runs", run]:
                if api.looks and run in api.runs:
                    api.looks.pop(0)(run)
                return self._one(api.runs, run)
        raise Refusal(404, "Not Found")

    def _post(self, path: str, query: dict[str, str]) -> Any:
        api = self.api
        match path.removeprefix("/apis/v2beta1/").split("/"):
            case ["experiments"]:
                return api.create_experiment(json.loads(self._body))
            case ["pipelines"]:
                return api.create_pipeline(json.loads(self._body))
            case ["pipelines", "upload_version"]:
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                (part,) = message_from_bytes(head + self._body).get_payload()
                return api.upload_version(query, part.get_payload(decode=True).decode())
            case ["runs"]:
                return api.create_run(json.loads(self._body))
            case ["recurringruns"]:
                return api.create_schedule(json.loads(self._body))
            case ["recurringruns", named]:
                schedule, _, action = named.partition(":")
                status = {"enable": "ENABLED", "disable": "DISABLED"}[action]
                self._one(api.schedules, schedule)["status"] = status
                return {}
        raise Refusal(404, "Not Found")

    def _page(self, field: str, kept: Mapping[str, dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        items, token = self.api.listed(kept, query)
        return {field: items, "next_page_token": token, "total_size": len(kept)}

    def _one(self, kept: dict[str, dict[str, Any]], key: str, remove: bool = False) -> dict[str, Any]:
        if key not in kept:
            raise Refusal(404, f"{key} not found")
        return kept.pop(key) if remove else kept[key]
