"""Answering prompts with what is deployed: the right model or none, the stored template, every row accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.artifacts import DataDir, ModelCard, content_digest, read_json, write_json, write_manifest
from components.base.architecture import train_tokenizer, untrained_llama
from components.deploy.settings import DeploySettings
from components.deploy.step import run as deploy
from components.errors import InputError
from components.generation import respond
from components.infer import step
from components.infer.prompts import read_prompts
from components.infer.settings import InferSettings
from components.models import load_policy, policy_card, save_model, scalar_from_policy
from components.records import Message, Prompt
from components.release import Deployment
from components.settings import Generation
from components.tokens import load_tokenizer, template_digest
from components.upload.settings import UploadSettings
from components.upload.step import run as upload

GENERATION = Generation(max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a reward and a cost model, and an evaluation that passed."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["what colour has the sky", "the sky is blue"], 300)
    card = policy_card("", "rl", tokenizer)
    save_model(untrained_llama("1m", tokenizer, 128), tokenizer, folder / "policy", card, settings={}, parents={})
    for kind in ("reward", "cost"):
        scalar = scalar_from_policy(folder / "policy")
        torch.nn.init.normal_(scalar.model.score.weight)
        scalar_card = ModelCard(kind, "", "reward", template_digest(tokenizer))
        save_model(scalar.model, tokenizer, folder / kind, scalar_card, settings={}, parents={})
    write_json(folder / "report" / "report.json", {"passed": True, "metrics": {}})
    return folder


@pytest.fixture
def world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """The inputs of the step: data with six test prompts, and the policy released and deployed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prompts = [Prompt(str(n), (Message("user", f"what colour has {n}?"),), "here") for n in range(6)]
    DataDir.write(tmp_path / "data", {("prompts", "test"): prompts}, {}, {})
    report, release = models / "report", tmp_path / "release"
    registry = UploadSettings(registry=str(tmp_path / "registry"))
    upload(registry, model=models / "policy", report=report, release=release)
    serving = DeploySettings(serving_dir=str(tmp_path / "serving"))
    deploy(serving, release=release, deployment=tmp_path / "deployment")
    return {
        "data": tmp_path / "data",
        "release": release,
        "deployment": tmp_path / "deployment",
        "reward": models / "reward",
        "cost": models / "cost",
        "responses": tmp_path / "responses",
    }


def answered(settings: InferSettings, world: dict[str, Any]) -> list[dict[str, Any]]:
    step.run(settings, **world)
    text = (world["responses"] / "responses.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.strip().split("\n")]


def served_folder(world: dict[str, Any]) -> Path:
    serving = Path(read_json(world["deployment"] / "deployment.json")["serving_dir"])
    return serving / read_json(serving / "current.json")["path"]


def test_every_prompt_is_answered_by_the_deployed_model_with_scores_and_its_digest(
    world: dict[str, Any], models: Path
) -> None:
    rows = answered(InferSettings(limit=5, generation=GENERATION, seed=3), world)
    assert [row["prompt"] for row in rows] == [f"what colour has {n}?" for n in range(5)]
    assert {row["model_digest"] for row in rows} == {content_digest(served_folder(world))[1]}
    assert all(set(row["scores"]) == {"reward", "cost"} for row in rows)
    assert len({row["scores"]["reward"] for row in rows}) == 5
    policy, tokenizer = load_policy(models / "policy"), load_tokenizer(models / "policy")
    prompts = [(Message("user", row["prompt"]),) for row in rows]
    expected = respond(policy, tokenizer, prompts, GENERATION, seed=3)
    assert [(row["response"], row["ended"]) for row in rows] == [(e.text, e.ended) for e in expected]
    manifest = read_json(world["responses"] / "manifest.json")
    assert manifest["counts"] == {"responses": 5} and "cost" in manifest["parents"]


def test_without_a_cost_model_there_is_no_cost(world: dict[str, Any]) -> None:
    world["cost"] = None
    rows = answered(InferSettings(limit=1, generation=GENERATION), world)
    assert [set(row["scores"]) for row in rows] == [{"reward"}]


def test_an_altered_file_in_the_serving_folder_fails_with_both_digests(world: dict[str, Any]) -> None:
    promoted = read_json(world["release"] / "release.json")["digest"]
    (served_folder(world) / "generation_config.json").write_text("{}")
    found = content_digest(served_folder(world))[1]
    with pytest.raises(InputError, match=f"digest {found}, but the promoted model's is {promoted}"):
        step.run(InferSettings(), **world)
    assert not world["responses"].exists()


def test_another_model_in_the_serving_folder_fails_though_it_is_whole(
    world: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "other" / "report.json", {"passed": True, "metrics": {"eval/win_rate": 0.9}})
    registry = UploadSettings(registry=str(tmp_path / "registry"))
    upload(registry, model=models / "policy", report=tmp_path / "other", release=tmp_path / "newer")
    serving = DeploySettings(serving_dir=str(tmp_path / "serving"))
    deploy(serving, release=tmp_path / "newer", deployment=tmp_path / "later")
    with pytest.raises(InputError, match="Something else was deployed"):
        step.run(InferSettings(), **world)


def test_a_template_that_is_not_the_one_of_the_training_is_refused(
    world: dict[str, Any], tmp_path: Path, models: Path
) -> None:
    version = served_folder(world)
    (version / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    digest = write_manifest(version, "version")
    release = read_json(world["release"] / "release.json")
    write_json(world["release"] / "release.json", release | {"digest": digest})
    deployment = read_json(world["deployment"] / "deployment.json")
    write_json(world["deployment"] / "deployment.json", deployment | {"digest": digest})
    with pytest.raises(InputError, match="the chat template has the digest"):
        step.run(InferSettings(), **world)


def test_a_prompt_file_is_answered_whole_in_all_its_forms(world: dict[str, Any], tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "a line\u2028break"},
    ]
    rows = ["plain", {"prompt": "wrapped"}, {"messages": turns}, {"prompt": turns}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = answered(InferSettings(prompts=str(path), limit=1, generation=GENERATION), world)
    assert [row["prompt"] for row in found] == ["plain", "wrapped", turns, turns]


def test_text_and_json_files_hold_prompts_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\r\n\n  second \n")
    (tmp_path / "a.json").write_text(json.dumps(["first", {"prompt": "second"}]))
    for name in ("a.txt", "a.json"):
        prompts = read_prompts(tmp_path / name)
        assert [prompt.prompt[0].content for prompt in prompts] == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '"fine"\n\n{"prompt": ', r"p\.jsonl:3: not JSON"),
        ("p.jsonl", '"fine"\n{"text": "no"}', r"p\.jsonl:2: the row holds text; accepted: a string"),
        ("p.jsonl", "[]", r"p\.jsonl:1: the row holds list; accepted"),
        ("p.jsonl", '{"prompt": 7}', r"p\.jsonl:1: field 'prompt' is 7"),
        ("p.jsonl", '{"prompt": "  "}', r"p\.jsonl:1: field 'prompt' is empty"),
        ("p.jsonl", '{"messages": []}', r"p\.jsonl:1: field 'messages' is empty"),
        (
            "p.jsonl",
            '{"messages": [{"role": "assistant", "content": "hi"}]}',
            r"p\.jsonl:1: field 'messages' is the assistant's last",
        ),
        ("p.json", '["fine", null]', r"p\.json row 2: the row holds NoneType"),
        ("p.json", '{"prompt": "alone"}', r"p\.json: holds dict; accepted: an array"),
        ("p.txt", "\n \n", r"p\.txt: no prompts in it"),
        ("p.csv", "prompt", r"p\.csv: prompts are read from \.jsonl, \.json, \.txt files"),
    ],
)
def test_a_malformed_prompt_is_named_by_file_and_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_prompt_file_names_the_setting(world: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"infer\.prompts: nowhere\.jsonl: no such file"):
        step.run(InferSettings(prompts="nowhere.jsonl"), **world)


def test_a_tilde_in_the_prompts_is_the_home_directory(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("what colour has the sky?")
    rows = answered(InferSettings(prompts="~/p.txt", generation=GENERATION), world)
    assert [row["prompt"] for row in rows] == ["what colour has the sky?"]


def on_kserve(world: dict[str, Any], *, applied: bool, **changed: str) -> str:
    """Make the deployment one on a cluster; the release's digest."""
    digest = str(read_json(world["release"] / "release.json")["digest"])
    Deployment(
        "kserve", digest[:12], changed.get("digest", digest), service="plumbline/tiny", applied=applied
    ).write(world["deployment"])
    return digest


def test_a_kserve_deployment_of_another_release_is_refused(world: dict[str, Any]) -> None:
    promoted = on_kserve(world, applied=False, digest="another")
    with pytest.raises(InputError, match=f"kserve deployment is deployed with the digest another, but .*{promoted}"):
        step.run(InferSettings(), **world)


def test_a_service_that_was_told_another_digest_is_refused(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted = on_kserve(world, applied=True)
    monkeypatch.setattr(step, "annotated_digest", lambda service: "another")
    with pytest.raises(InputError, match=f"InferenceService plumbline/tiny .* digest another, but .*{promoted}"):
        step.run(InferSettings(), **world)


@pytest.mark.parametrize(
    ("applied", "warning"), [(True, "does not say what it serves"), (False, "was not applied by deploy")]
)
def test_a_service_that_cannot_be_asked_costs_a_warning(
    world: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    applied: bool,
    warning: str,
) -> None:
    promoted = on_kserve(world, applied=applied)
    monkeypatch.setattr(step, "annotated_digest", lambda service: None)
    rows = answered(InferSettings(limit=1, generation=GENERATION), world)
    assert rows[0]["model_digest"] == promoted and warning in caplog.text
