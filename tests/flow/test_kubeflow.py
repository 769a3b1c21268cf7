"""The commands for a cluster, with the real kfp client over HTTP, against a stand-in for Kubeflow's API server."""

import http.server
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from kubeflow_standin import KubeflowStandIn, Refusal
from pipeline import board
from pipeline.cli import main
from pipeline.fingerprints import code_fingerprints
from pipeline.overrides import resolve
from pipeline.package import compiled
from pipeline.settings import TASKS, Settings

pytestmark = pytest.mark.tried(
    "submit, schedules, re-runs, status and logs",
    against="kfp's client, real; a stand-in for Kubeflow's API server",
)

UUID = "[0-9a-f]{8}-[0-9a-f-]{27}"
Plumbline = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code behind the tasks is not read and what is the same is not compiled again, for every submission."""
    monkeypatch.setattr("pipeline.orders.code_fingerprints", lambda settings: dict.fromkeys(settings.tasks(), "code"))
    monkeypatch.setattr("pipeline.orders.compiled", compiled_once)


def compiled_once(settings: Settings, code: dict[str, str], made: dict[str, str] = {}) -> str:  # noqa: B006  # a cache
    key = f"{settings.model_dump_json()}{code}"
    if key not in made:
        made[key] = compiled(settings, code)
    return made[key]


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeflowStandIn]:
    """A stand-in that the environment names."""
    with KubeflowStandIn().serving() as api:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", api.url)
        yield api


@pytest.fixture
def plumbline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Plumbline:
    """Runs a command line in an empty folder; its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(board, "POLL_S", 0.01)

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plumbline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(ended.value.code or 0), shown.out, shown.err

    return go


def submitted(plumbline: Plumbline, *arguments: str) -> str:
    """The id of a run of the demo pipeline."""
    code, out, err = plumbline("submit", "-c", "demo", *arguments)
    assert code == 0, err
    return re.findall(rf"^run ({UUID}) ", out, re.MULTILINE)[0]


def refused(answer: tuple[int, str, str]) -> str:
    """The one message of a command that was refused."""
    code, _, err = answer
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# --- submit ---


def test_submit_uploads_a_version_and_starts_a_run_with_the_whole_settings_of_every_task(
    kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    run = kubeflow.runs[submitted(plumbline, "rl.rollouts=7")]
    parameters = run["runtime_config"]["parameters"]
    settings = resolve([Path("demo")], ["rl.rollouts=7"])
    assert set(parameters) == set(TASKS)
    assert parameters["rl"] == settings.rl.model_dump(mode="json", exclude_none=True)
    assert kubeflow.experiments[run["experiment_id"]]["display_name"] == "demo"
    assert [pipeline["display_name"] for pipeline in kubeflow.pipelines.values()] == ["demo"]


def test_the_same_content_is_the_same_version_and_other_code_or_settings_are_another(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = submitted(plumbline), submitted(plumbline, "--experiment", "mine")
    assert len(kubeflow.versions) == 1 and len(kubeflow.pipelines) == 1
    assert kubeflow.runs[first]["experiment_id"] != kubeflow.runs[second]["experiment_id"]
    submitted(plumbline, "rl.rollouts=7")
    assert len(kubeflow.versions) == 2
    monkeypatch.setattr("pipeline.orders.code_fingerprints", lambda settings: {"sft": "other code"})
    changed = kubeflow.runs[submitted(plumbline)]
    assert len(kubeflow.versions) == 3 and constant(kubeflow, changed, "sft", "fingerprint") == "other code"


def test_the_code_behind_a_task_is_part_of_its_cache_key(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.orders.code_fingerprints", code_fingerprints)
    first = submitted(plumbline)
    code = constant(kubeflow, kubeflow.runs[first], "sft", "fingerprint")
    assert code == code_fingerprints(resolve([Path("demo")]))["sft"]
    assert ran(kubeflow.execute(first)) == list(TASKS)
    assert ran(kubeflow.execute(submitted(plumbline))) == []
    changed = code_fingerprints(resolve([Path("demo")])) | {"rl": "new", "base": "newer"}
    monkeypatch.setattr("pipeline.orders.code_fingerprints", lambda settings: changed)
    last = submitted(plumbline)
    assert ran(kubeflow.execute(last)) == ["rl", "evaluate", "upload", "deploy", "infer"]
    # what reads sources is told its fingerprint by the task that looks at them
    assert constant(kubeflow, kubeflow.runs[last], "sources", "code")["base"] == "newer"


def constant(kubeflow: KubeflowStandIn, run: dict[str, Any], task: str, parameter: str) -> Any:
    """What is written in the compiled pipeline for a task's parameter."""
    spec = kubeflow.spec(run)
    dags = [holder["dag"]["tasks"] for holder in (spec["root"], *spec["components"].values()) if "dag" in holder]
    (found,) = [node for tasks in dags for node in tasks.values() if node["taskInfo"]["name"] == task]
    return found["inputs"]["parameters"][parameter]["runtimeValue"]["constant"]


def ran(done: dict[str, str]) -> list[str]:
    return [task for task in TASKS if done[task] == "ran"]


def test_new_data_behind_the_same_address_is_seen_when_a_run_starts(
    kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    schedule = scheduled(plumbline, "--every", "1d")
    seen = {"preprocess": "one", "base": "one", "evaluate": "one", "infer": "one"}
    found = [kubeflow.execute(kubeflow.trigger(schedule), outputs={"sources": seen}) for _ in range(2)]
    assert [ran(done) for done in found] == [list(TASKS), []]
    assert {done["sources"] for done in found} == {"ran"}  # it is never cached
    for task, follows in (("infer", ["infer"]), ("evaluate", list(TASKS[8:])), ("preprocess", list(TASKS[1:]))):
        seen = seen | {task: "two"}
        assert ran(kubeflow.execute(kubeflow.trigger(schedule), outputs={"sources": seen})) == follows


def test_what_is_lost_with_its_container_is_told(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    _, out, _ = plumbline("submit", "-c", "demo")
    assert out.count("warning: ") == 2 and "warning: upload.registry is models" in out
    _, out, _ = plumbline("submit", "-c", "demo", "upload.registry=gs://b/models", "deploy.target=kserve")
    assert "warning" not in out


@pytest.mark.parametrize(
    ("outcome", "code", "ending"),
    [({}, 0, "succeeded in"), ({"passes": False}, 0, "rejected in"), ({"fails": ["sft"]}, 1, "failed in")],
)
def test_waiting_shows_each_step_and_ends_as_the_run_does(
    outcome: dict[str, Any], code: int, ending: str, kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    kubeflow.looks = [
        lambda run: kubeflow.progress(run, demo="running"),
        lambda run: kubeflow.progress(run, demo="ran", preprocess="running"),
        lambda run: kubeflow.execute(run, **outcome),
    ]
    ended, out, _ = plumbline("submit", "-c", "demo", "--wait")
    lines = out.splitlines()
    assert ended == code
    assert lines.count("demo       started") == lines.count("preprocess started") == 1
    assert [line.split() for line in lines if line.startswith("demo ")][1:] == [
        ["demo", "done", "1:30"], ["demo", "succeeded", "1:30"],
    ]  # fmt: skip
    assert any(line.startswith(ending) for line in lines)
    status = dict(line.split()[:2] for line in lines[lines.index("step       status         time") + 1 :][:13])
    assert status["cost"] == ("skipped" if "fails" in outcome else "succeeded")
    assert status["upload"] == ("succeeded" if not outcome else "skipped")
    if "fails" in outcome:
        assert status["sft"] == "failed" and re.search(rf"^  sft      plumbline logs {UUID} sft$", out, re.MULTILINE)


def test_waiting_outlasts_an_api_that_is_away(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    kubeflow.looks = [lambda run: kubeflow.failures.extend([503, 502]), lambda run: kubeflow.execute(run)]
    code, out, _ = plumbline("submit", "-c", "demo", "--wait")
    assert code == 0 and out.count("Still waiting.") == 1


def test_waiting_gives_up_when_the_api_stays_away(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "PATIENCE_S", 0.03)
    kubeflow.looks = [lambda run: kubeflow.failures.extend([503] * 9)]
    assert "failed (503: upstream connect error)" in refused(plumbline("submit", "-c", "demo", "--wait"))


def test_ctrl_c_ends_the_watching_and_not_the_run(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(board, "time", SimpleNamespace(sleep=interrupt))
    code, out, _ = plumbline("submit", "-c", "demo", "--wait")
    (run,) = kubeflow.runs
    assert code == 130 and f"The run goes on. To see it again: plumbline status {run} --wait" in out
    assert kubeflow.runs[run]["state"] == "PENDING"


# --- the connection ---


def test_without_a_host_or_with_a_wrong_one_there_is_one_message(
    plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    assert "--host is missing" in refused(plumbline("schedule", "list"))
    answer = refused(plumbline("schedule", "list", "--host", "http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 cannot be reached" in answer and "refused" in answer
    assert "cannot be reached" in refused(plumbline("schedule", "list", "--host", "http://no.such.host.invalid"))


def test_a_page_in_place_of_the_api_is_told(plumbline: Plumbline) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Sign in with multi_user</html>")

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/pipeline"
    message = refused(plumbline("schedule", "list", "--host", url))
    server.shutdown()
    server.server_close()
    assert f"{url} answers, but not as Kubeflow Pipelines does" in message and "login page" in message


def test_a_connection_that_is_not_secure_is_told(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, tmp_path: Path
) -> None:
    secure = kubeflow.url.replace("http://", "https://")
    message = refused(plumbline("schedule", "list", "--host", secure))
    assert "no secure connection" in message and "--ca-cert" in message
    assert "no such file" in refused(plumbline("schedule", "list", "--ca-cert", "nowhere.pem"))
    (tmp_path / "broken.pem").write_text("no certificate")
    assert "broken.pem" in refused(plumbline("schedule", "list", "--host", secure, "--ca-cert", "broken.pem"))


def test_the_token_comes_from_a_file_or_the_environment_and_is_never_shown(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.token = "s3cret"
    assert "401" in refused(plumbline("schedule", "list"))
    monkeypatch.setenv("PLUMBLINE_TOKEN", "wr0ng")
    message = refused(plumbline("schedule", "list"))
    assert "wr0ng" not in message and "Bearer ***" in message  # the stand-in repeats what it was given
    monkeypatch.setenv("PLUMBLINE_TOKEN", "s3cret")
    assert plumbline("schedule", "list")[0] == 0
    monkeypatch.delenv("PLUMBLINE_TOKEN")
    (tmp_path / "token").write_text("0ld\n")
    kubeflow.looks = [
        lambda run: (tmp_path / "token").write_text("n3w"),  # rotated while a run is watched
        lambda run: kubeflow.execute(run),
    ]
    kubeflow.token = "0ld"
    run = submitted(plumbline, "--token-file", "token")
    (tmp_path / "token").write_text("n3w")
    kubeflow.token = "n3w"
    code, out, err = plumbline("status", run, "--token-file", "token")
    assert code == 0 and "n3w" not in out + err
    assert "nowhere: no such file" in refused(plumbline("status", run, "--token-file", "nowhere"))


def test_with_several_users_the_namespace_is_asked_for_and_goes_along(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.namespace = "ann"
    assert "has several users: name your namespace" in refused(plumbline("submit", "-c", "demo"))
    assert "403" in refused(plumbline("submit", "-c", "demo", "--namespace", "bob"))
    monkeypatch.setenv("PLUMBLINE_NAMESPACE", "ann")
    submitted(plumbline)
    assert {item["namespace"] for item in (*kubeflow.experiments.values(), *kubeflow.pipelines.values())} == {"ann"}


def test_a_namespace_does_no_harm_where_there_is_one_user(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    submitted(plumbline, "--namespace", "kubeflow")
    assert all("namespace" not in item for item in kubeflow.experiments.values())


# --- rerun ---


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("rl", ["rl", "evaluate", "upload", "deploy", "infer"]),
        ("cost", ["cost", "rl", "evaluate", "upload", "deploy", "infer"]),
        ("infer", ["infer"]),
    ],
)
def test_a_rerun_takes_what_comes_before_from_the_cache(
    step: str, expected: list[str], kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    run = submitted(plumbline)
    kubeflow.execute(run)
    code, out, _ = plumbline("rerun", run, "--step", step)
    again = list(kubeflow.runs)[-1]
    assert code == 0 and f"run {again} " in out
    assert ran(kubeflow.execute(again)) == expected
    for kept in ("experiment_id", "pipeline_version_reference"):
        assert kubeflow.runs[again][kept] == kubeflow.runs[run][kept]


def test_a_rerun_changes_settings_and_leaves_the_rest_as_it_came(
    kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    run = submitted(plumbline)
    before = kubeflow.runs[run]["runtime_config"]["parameters"]
    before["sft"]["seed"] = 5.0  # as the API gives numbers back
    kubeflow.execute(run)
    assert plumbline("rerun", run, "--step", "rl", "rl.algorithm.kl_coef=0.1", "infer.limit=3")[0] == 0
    again = list(kubeflow.runs)[-1]
    after = kubeflow.runs[again]["runtime_config"]["parameters"]
    assert after["rl"].pop("rerun") and after["rl"]["algorithm"].pop("kl_coef") == 0.1
    assert after["infer"].pop("limit") == 3
    before["rl"]["algorithm"].pop("kl_coef"), before["infer"].pop("limit")
    assert after.pop("rl_gpus") == "1"  # what the run did not say is the version's
    assert {name: value for name, value in after.items() if "_" not in name} == before
    assert kubeflow.execute(again)["cost"] == "cached"


def test_two_reruns_are_two(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    run = submitted(plumbline)
    kubeflow.execute(run)
    for _ in range(2):
        plumbline("rerun", run, "--step", "infer")
        assert ran(kubeflow.execute(list(kubeflow.runs)[-1])) == ["infer"]


def test_a_rerun_that_cannot_be_is_refused_and_starts_nothing(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    run = submitted(plumbline)

    def refusal(*arguments: str) -> str:
        return refused(plumbline("rerun", run, *arguments))

    assert "--step is 'fly'; accepted, of the run's steps: demo, preprocess" in refusal("--step", "fly")
    earlier = refusal("--step", "rl", "sft.training.epochs=3")
    assert "sft.training.epochs=3: with --step rl, settings of rl, evaluate, upload, deploy, infer" in earlier
    assert "seed=3: with --step rl" in refusal("--step", "rl", "seed=3")
    assert "is another pipeline" in refusal("--step", "rl", "rl.algorithm.name=ppo")
    assert "rl.algorithm.kl_coef is -1" in refusal("--step", "rl", "rl.algorithm.kl_coef=-1")
    kubeflow.versions.clear()
    assert "was deleted" in refusal("--step", "rl")
    assert len(kubeflow.runs) == 1


def test_a_run_that_nobody_knows_is_told(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["rerun", "nothing", "--step", "rl"], ["status", "nothing"], ["logs", "nothing", "rl"]):
        assert f"{kubeflow.url} has no run nothing" in refused(plumbline(*command))
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    assert "runs/nothing: no such folder, so nothing is no local run" in refused(plumbline("status", "nothing"))


# --- status and logs ---


def test_status_shows_the_steps_as_they_are(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    run = submitted(plumbline)
    kubeflow.progress(run, demo="ran", preprocess="running")
    code, out, _ = plumbline("status", run)
    lines = out.splitlines()
    assert code == 0
    assert [line.split() for line in lines[2:6]] == [
        ["sources", "waiting"], ["demo", "succeeded", "1:30"], ["preprocess", "running", "1:30"], ["base", "waiting"],
    ]  # fmt: skip
    assert any(line.startswith("running for") for line in lines)
    assert lines[-1] == f"  page     {kubeflow.url}/#/runs/details/{run}"
    kubeflow.looks = [lambda run: kubeflow.execute(run, fails=["rl"])]
    assert plumbline("status", run, "--wait")[0] == 1


def test_logs_come_from_the_pod_of_the_last_attempt(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    from pipeline.pods import fnv1a

    run = submitted(plumbline)
    assert "sft has not started" in refused(plumbline("logs", run, "sft"))
    kubeflow.execute(run)
    workflow, template = "plumbline-x7k2p", "retry-system-container-impl"
    for place, text in {
        "root.exit-handler-1.sft.executor(0)": "first attempt\n",
        "root.exit-handler-1.sft.executor(1)": "second attempt\n",
        "root.exit-handler-1.condition-2.infer.executor(0)": "answers\n",
    }.items():
        kubeflow.pod_logs[f"{workflow}-{template}-{fnv1a(f'{workflow}.{place}')}"] = text
    assert plumbline("logs", run, "sft")[1] == "second attempt\n"
    assert plumbline("logs", run, "infer")[1] == "answers\n"
    assert "accepted: " in refused(plumbline("logs", run, "fly"))


def test_where_the_host_has_no_log_the_commands_that_ask_kubernetes_are_told(
    kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    run = submitted(plumbline)
    kubeflow.execute(run)
    code, _, err = plumbline("logs", run, "rl", "--namespace", "ann")
    assert code == 2 and "gives no log of rl" in err
    assert f"kubectl -n ann get pods -l pipeline/runid={run} " in err and "kubectl -n ann logs POD -c main" in err


def test_argo_numbers_its_nodes_by_fnv_1a() -> None:
    from pipeline.pods import fnv1a

    # the published test vectors of the hash (draft-eastlake-fnv)
    assert [fnv1a(text) for text in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]


# --- schedules ---


def scheduled(plumbline: Plumbline, *arguments: str) -> str:
    """The id of a new schedule of the demo pipeline."""
    code, out, err = plumbline("schedule", *arguments, "-c", "demo")
    assert code == 0, err
    return re.findall(rf"^schedule ({UUID}) ", out, re.MULTILINE)[0]


def test_a_schedule_is_made_with_the_version_and_the_whole_settings(
    kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    made = kubeflow.schedules[scheduled(plumbline, "--cron", "0 3 * * 1")]
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}  # seconds in front, as Kubeflow reads it
    assert (made["max_concurrency"], made["no_catchup"], made["status"]) == ("1", True, "ENABLED")
    assert set(made["runtime_config"]["parameters"]) == set(TASKS)
    assert made["pipeline_version_reference"]["pipeline_version_id"] in kubeflow.versions
    other = kubeflow.schedules[scheduled(plumbline, "--every", "6h", "--max-concurrency", "3", "--catch-up")]
    assert other["trigger"] == {"periodic_schedule": {"interval_second": "21600"}}
    assert (other["max_concurrency"], other["no_catchup"]) == ("3", False)


def test_schedules_are_listed_paused_resumed_and_deleted_by_id_or_name(
    kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    ids = [scheduled(plumbline, "--every", period) for period in ("6h", "2d", "90s")]
    lines = plumbline("schedule", "list")[1].splitlines()
    assert [line.split()[0] for line in lines] == ids
    assert lines[1].split()[1:] == ["on", "every", "2d", "demo", "every", "2d"]
    assert plumbline("schedule", "pause", "demo every 2d")[1] == f"schedule {ids[1]} is paused\n"
    assert [item["status"] for item in kubeflow.schedules.values()] == ["ENABLED", "DISABLED", "ENABLED"]
    assert "paused" in plumbline("schedule", "list")[1].splitlines()[1]
    plumbline("schedule", "resume", ids[1])
    assert kubeflow.schedules[ids[1]]["status"] == "ENABLED"
    plumbline("schedule", "delete", ids[0])
    assert list(kubeflow.schedules) == ids[1:]
    assert f"accepted: {ids[1]} (demo every 2d)" in refused(plumbline("schedule", "pause", "demo every 6h"))
    same = scheduled(plumbline, "--every", "2d")
    assert f"2 schedules are called 'demo every 2d'; name one by its id: {ids[1]}, {same}" in refused(
        plumbline("schedule", "delete", "demo every 2d")
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--cron", "0 3 * *"], "4 fields"),
        (["--cron", "0 3 * * 1 * *"], "7 fields"),
        (["--cron", "61 3 * * 1"], "the minute is '61'; accepted: 0 to 59"),
        (["--cron", "0 3 * * 7"], "the day of the week is '7'; accepted: 0 to 6 or sun to sat"),
        (["--cron", "0 3 * * fri-mon"], "'fri-mon'"),
        (["--cron", "0 */0 * * *"], "the hour is '*/0'"),
        (["--cron", "@daily"], "1 fields"),
        (["--every", "6"], "--every is '6'; accepted: a whole number and its unit"),
        (["--every", "0h"], "--every is '0h'"),
        ([], "give --cron or --every"),
        (["--every", "6h", "--cron", "0 3 * * 1"], "and not both"),
    ],
)
def test_a_time_that_is_none_is_refused_here(
    option: list[str], words: str, kubeflow: KubeflowStandIn, plumbline: Plumbline
) -> None:
    assert words in refused(plumbline("schedule", *option, "-c", "demo"))
    assert not kubeflow.asked


@pytest.mark.parametrize(
    ("cron", "six"),
    [
        ("*/15 0-6 1,15 jan-mar ?", "0 */15 0-6 1,15 jan-mar ?"),
        ("30 0 3 * * MON-FRI", "30 0 3 * * MON-FRI"),
        ("0 3 * * 1", "0 0 3 * * 1"),
    ],
)
def test_five_fields_of_cron_are_given_the_seconds(cron: str, six: str) -> None:
    from pipeline.crontab import six_fields

    assert six_fields(cron) == six


# --- the stand-in refuses what the API server refuses ---


REFUSED: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("runs", {"display_name": ""}, 400),
    ("runs", {"experiment_id": "nothing"}, 404),
    ("runs", {"pipeline_version_reference": None}, 400),
    ("runs", {"pipeline_version_reference": {"pipeline_id": "x", "pipeline_version_id": "y"}}, 404),
    ("runs", {"colour": "red"}, 400),
    ("runs", {"storage_state": "LOST"}, 400),
    ("runs", {"runtime_config": {"parameters": {"fly": {}}}}, 400),
    ("runs", {"runtime_config": {"parameters": {"rl": 3}}}, 400),
    ("runs", {"runtime_config": {"parameter": {}}}, 400),
    ("recurringruns", {"mode": "SOMETIMES"}, 400),
    ("recurringruns", {"mode": "MODE_UNSPECIFIED"}, 400),
    ("recurringruns", {"max_concurrency": "11"}, 400),
    ("recurringruns", {"trigger": {"cron_schedule": {"cron": "0 0 3 * * 9"}}}, 400),
    ("recurringruns", {"trigger": {"cron_schedule": {"cron": "never"}}}, 400),
    ("recurringruns", {"trigger": {"periodic_schedule": {"interval_second": "0"}}}, 400),
    ("recurringruns", {"trigger": {"often": {}}}, 400),
)


def test_the_stand_in_refuses_what_the_api_refuses(kubeflow: KubeflowStandIn, plumbline: Plumbline) -> None:
    made = kubeflow.schedules[scheduled(plumbline, "--every", "6h")]
    common = ("display_name", "experiment_id", "pipeline_version_reference")
    keys = {"runs": common, "recurringruns": (*common, "mode", "max_concurrency", "trigger")}
    for kind, change, code in (("runs", {}, 200), ("recurringruns", {}, 200), *REFUSED):
        body = {key: made[key] for key in keys[kind]} | change
        given = {key: value for key, value in body.items() if value is not None}
        assert httpx.post(f"{kubeflow.url}/apis/v2beta1/{kind}", json=given).status_code == code, (kind, change)
    kubeflow.token = "s3cret"
    assert httpx.get(f"{kubeflow.url}/apis/v2beta1/recurringruns").status_code == 401


def test_what_the_api_refuses_is_said_in_its_words(
    kubeflow: KubeflowStandIn, plumbline: Plumbline, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.failures = [400]
    assert "refuses (400: upstream connect error)" in refused(plumbline("schedule", "list"))

    def hang_up(body: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(0, "")

    monkeypatch.setattr(kubeflow, "create_schedule", hang_up)
    assert "cannot be reached" in refused(plumbline("schedule", "--every", "6h", "-c", "demo"))
