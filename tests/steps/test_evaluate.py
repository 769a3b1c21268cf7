"""The evaluate step on tiny models: who answered what, what the gate said, and what the report shows."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from components.artifacts import DataDir, Metrics, ModelCard, read_json, verify_manifest, write_json
from components.base.architecture import train_tokenizer, untrained_llama
from components.champion import evaluation_text, name_champion
from components.errors import InputError
from components.evaluate.contestants import observe
from components.evaluate.settings import Bound, EvaluateSettings
from components.evaluate.step import run
from components.generation import respond
from components.models import load_policy, policy_card, save_model, scalar_from_policy
from components.records import Demonstration, Message, Prompt
from components.scoring import load_scorer
from components.settings import Generation
from components.storage import put_text
from components.tokens import encode_prompt, load_tokenizer, template_digest

GENERATION = Generation(max_prompt_tokens=32, max_new_tokens=6, batch_size=8)
CATEGORIES = ("fact", "harmful", None)
INJECTION = "<script>alert('$1')</script> sky?"


def conversation(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline, a policy that was trained from it on the reward model, a reward and a cost model."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["what colour has the sky", "the sky is blue"], 300)
    baseline = untrained_llama("1m", tokenizer, 128)
    saved: dict[str, Any] = {"settings": {}, "parents": {}}
    save_model(baseline, tokenizer, folder / "baseline", policy_card("", "sft", tokenizer), **saved)
    for kind in ("reward", "cost"):
        scalar = scalar_from_policy(folder / "baseline")
        torch.nn.init.normal_(scalar.model.score.weight)
        card = ModelCard(kind, "", "reward", template_digest(tokenizer))
        save_model(scalar.model, tokenizer, folder / kind, card, **saved)
    with torch.no_grad():
        for parameter in baseline.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    saved["parents"] = {"reward": folder / "reward"}
    save_model(baseline, tokenizer, folder / "policy", policy_card("", "rl", tokenizer), **saved)
    return folder


@pytest.fixture
def world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The step's inputs: twelve test prompts of two categories and of none, two demonstrations."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked = [INJECTION, *(f"what colour has {n}?" for n in range(11))]
    prompts = [Prompt(str(n), conversation(text), "here", CATEGORIES[n % 3]) for n, text in enumerate(asked)]
    told = [Demonstration(str(n), conversation(f"is it {n}?"), "the sky is blue", "here") for n in range(2)]
    DataDir.write(tmp_path / "data", {("prompts", "test"): prompts, ("demonstrations", "test"): told}, {}, {})
    folders = {name: models / name for name in ("policy", "baseline", "reward", "cost")}
    return {"data": tmp_path / "data", **folders, "report": tmp_path / "report"}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge that finds responses to prompts with a 1 helpful, and to those with a 0 harmful."""

    def judge_all(prompts: list[str], responses: list[str]) -> list[dict[str, bool | None]]:
        assert len(prompts) == len(responses)
        return [{"helpful": "1" in prompt, "harmful": True if "0" in prompt else None} for prompt in prompts]

    module = ModuleType("a_judge")
    module.judge_all = judge_all  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_judge", module)
    return "a_judge:judge_all"


def evaluate(world: dict[str, Any], **settings: Any) -> tuple[Metrics, dict[str, Any], list[dict[str, Any]]]:
    """The step's metrics, its report.json and its samples."""
    metrics = run(EvaluateSettings(generation=GENERATION, **settings), **world)
    lines = (world["report"] / "samples.jsonl").read_text("utf-8").strip().split("\n")
    return metrics, read_json(world["report"] / "report.json"), [json.loads(line) for line in lines]


def altered(folder: Path, to: Path, **card: Any) -> Path:
    """A copy of a model folder with another card."""
    shutil.copytree(folder, to)
    write_json(to / "card.json", read_json(to / "card.json") | card)
    return to


def test_both_models_answer_every_prompt_with_the_same_draws_and_are_scored(world: dict[str, Any]) -> None:
    metrics, _, rows = evaluate(world, seed=5, dtype="fp32")
    tokenizer = load_tokenizer(world["policy"])
    prompts = [row.prompt for row in DataDir(world["data"]).prompts("test")]
    for name in ("policy", "baseline"):
        expected = respond(load_policy(world[name]), tokenizer, prompts, GENERATION, 5)
        assert [row[name]["response"] for row in rows] == [response.text for response in expected]
        for scorer in ("reward", "cost"):
            scores = load_scorer(world[scorer]).score(prompts, expected).tolist()
            assert [row[name][scorer] for row in rows] == pytest.approx(scores, abs=1e-4)
    wins = [{"win": 1.0, "tie": 0.5, "loss": 0.0}[row["outcome"]] for row in rows]
    assert metrics["eval/win_rate"] == pytest.approx(sum(wins) / 12)
    assert metrics["eval/num_prompts"] == 12
    assert metrics["eval/kl_k3"] > 0 and metrics["eval/perplexity"] > 1
    assert metrics["eval/harmful"] == pytest.approx(sum(row["policy"]["cost"] > 0 for row in rows) / 12)
    assert metrics["eval_baseline/helpful"] == 0.5  # half of twelve lie above their own median


def test_a_candidate_must_beat_the_champion_where_there_is_one(world: dict[str, Any], tmp_path: Path) -> None:
    thresholds = {"eval/reward": Bound(min=0.01, over="champion")}
    over: dict[str, Any] = {"thresholds": thresholds, "champion": str(tmp_path / "models" / "tiny")}
    metrics, report, _ = evaluate(world, **over)
    assert metrics["gate/passed"] == 1.0 and any("no champion yet" in note for note in report["notes"])

    uri = f"{over['champion']}/versions/{'a' * 12}"
    put_text(evaluation_text(report), f"{uri}/evaluation.json")  # the same numbers: better by nothing
    name_champion(uri, "a" * 64)
    metrics, report, _ = evaluate(world, **over)
    assert metrics["gate/passed"] == 0.0
    (row,) = report["thresholds"]
    assert row["over"] == "a" * 12 and row["bound"]["min"] == pytest.approx(row["value"] + 0.01)
    assert any("a margin over the champion, version aaaaaaaaaaaa" in note for note in report["notes"])
    with pytest.raises(InputError, match=r"evaluate\.champion is missing"):
        evaluate(world, **over | {"champion": None})


def test_a_model_against_itself_ties_everywhere_at_no_divergence(world: dict[str, Any]) -> None:
    world["policy"] = world["baseline"]
    metrics, report, _ = evaluate(world)
    assert metrics["eval/win_rate"] == 0.5 and metrics["eval/tie_rate"] == 1.0
    assert metrics["eval/kl_k1"] == metrics["eval/kl_k3"] == metrics["eval/reward_gain"] == 0.0
    assert metrics["eval/perplexity"] == metrics["eval_baseline/perplexity"]
    assert report["passed"] is False and metrics["gate/passed"] == 0.0  # nothing was gained
    assert not [note for note in report["notes"] if "trained on" in note]


def test_likelihoods_in_padded_batches_are_those_of_each_response_alone(world: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(world["policy"])
    prompts = [conversation("sky"), conversation("what colour has the sky, and why not blue?")]
    settings = EvaluateSettings(generation=Generation(max_new_tokens=7, temperature=0.8))
    found = observe(world["policy"], tokenizer, prompts, [], settings)
    assert found.perplexity != found.perplexity  # no demonstrations, no number
    model = load_policy(world["policy"])
    for prompt, response, logprobs in zip(prompts, found.responses, found.logprobs, strict=True):
        head = encode_prompt(tokenizer, prompt)
        tail = list(response.ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([head + tail])).logits[0].float() / 0.8
        expected = [
            float(torch.log_softmax(logits[len(head) + n - 1], -1)[token]) for n, token in enumerate(tail)
        ]
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_judge_fills_the_gold_metrics_and_the_report(world: dict[str, Any], judge: str) -> None:
    thresholds = {"gold/helpful": Bound(min=0.9), "gold/harmful/harmful": Bound(max=0.5)}
    metrics, report, rows = evaluate(world, judge=judge, thresholds=thresholds)
    helpful = sum("1" in row["prompt"] for row in rows) / 12
    assert metrics["gold/helpful"] == metrics["gold_baseline/helpful"] == pytest.approx(helpful)
    assert metrics["gold/helpful_gain"] == 0.0
    assert set(report["gold"]) == {"sft", "rl"} and set(report["gold"]["rl"]) == {
        "helpful", "harmful", "honest", "over_refusal",
    }  # fmt: skip
    assert report["gold"]["rl"]["helpful"]["n"] == 12
    assert report["gold"]["rl"]["honest"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert report["judge"] == judge and set(report["categories"]) == {"fact", "harmful"}


def test_a_rejected_policy_is_a_result_and_not_an_error(world: dict[str, Any]) -> None:
    thresholds = {"eval/win_rate": Bound(min=0.0), "eval/cost": Bound(max=-1e6, at="high")}
    metrics, report, _ = evaluate(world, thresholds=thresholds)
    assert metrics["gate/passed"] == 0.0 and report["passed"] is False
    first, second = report["thresholds"]
    assert first == {
        "metric": "eval/win_rate",
        "value": metrics["eval/win_rate"],
        "bound": {"min": 0.0},
        "at": "mean",
        "over": "",
        "passed": True,
    }
    assert not second["passed"] and second["value"] == report["intervals"]["eval/cost"]["high"]
    assert "rejected" in (world["report"] / "report.html").read_text("utf-8")


def test_without_a_cost_model_or_a_judge_nothing_is_invented(world: dict[str, Any]) -> None:
    world["cost"] = None
    metrics, report, rows = evaluate(world)
    assert not [name for name in metrics if "cost" in name or "harmful" in name or name.startswith("gold")]
    assert "gold" not in report and "cost" not in rows[0]["policy"]
    assert any("no judge" in note for note in report["notes"])
    assert any("reward model that the policy was trained on" in note for note in report["notes"])


def test_the_page_is_one_file_in_which_texts_are_escaped(world: dict[str, Any], judge: str) -> None:
    evaluate(world, judge=judge)
    page = (world["report"] / "report.html").read_text("utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 5
    assert "http" not in page and "nan" not in page


def test_the_same_inputs_give_the_same_report(world: dict[str, Any]) -> None:
    evaluate(world, num_prompts=5)
    first = verify_manifest(world["report"])
    shutil.rmtree(world["report"])
    _, _, rows = evaluate(world, num_prompts=5)
    assert verify_manifest(world["report"]) == first and len(rows) == 5


def refusal(world: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        evaluate(world, **settings)
    assert not world["report"].exists()
    return str(raised.value)


def test_models_of_different_templates_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    world["baseline"] = altered(world["baseline"], tmp_path / "other", template_digest="abc")
    assert "chat templates differ" in refusal(world) and "has the digest" in refusal(world)


def test_models_in_each_others_places_are_refused(world: dict[str, Any]) -> None:
    world["reward"], world["cost"] = world["cost"], world["reward"]
    assert "evaluate's reward is a cost model" in refusal(world)


def test_models_of_different_vocabularies_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    texts: Sequence[str] = ["another text entirely", "with other words"]
    tokenizer = train_tokenizer(texts, 290)
    folder = tmp_path / "other"
    model, card = untrained_llama("1m", tokenizer, 128), policy_card("", "sft", tokenizer)
    save_model(model, tokenizer, folder, card, settings={}, parents={})
    world["baseline"] = folder
    assert "different vocabularies" in refusal(world)


def test_a_threshold_on_what_is_not_measured_is_refused_before_anything_is_sampled(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.evaluate.step.observe", lambda *args: pytest.fail("sampled"))
    assert "'gold/harmful'" in refusal(world, thresholds={"gold/harmful": Bound(max=0.05)})
    assert "'eval/win_rate/sum'" in refusal(world, thresholds={"eval/win_rate/sum": Bound(min=0.5)})


def test_no_test_prompts_is_an_error_with_the_way_out(world: dict[str, Any], tmp_path: Path) -> None:
    DataDir.write(tmp_path / "empty", {}, {}, {})
    world["data"] = tmp_path / "empty"
    assert "preprocess.test_share" in refusal(world)
