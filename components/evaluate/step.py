"""Evaluation: policy and baseline answer the held-out prompts, and the gate decides on what was measured."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.artifacts import (
    MANIFEST,
    DataDir,
    Metrics,
    ModelCard,
    folder_digest,
    read_manifest,
    write_manifest,
)
from components.champion import Champion, read_champion
from components.errors import InputError
from components.evaluate.contestants import Contestant, common_tokenizer, divergence, observe
from components.evaluate.gate import check_champion, check_names, checks
from components.evaluate.judges import Judge
from components.evaluate.measures import distinct, measure, measurements, point_names
from components.evaluate.report import Report
from components.evaluate.samples import Answer, Sample, Verdict, drawn, outcome
from components.evaluate.settings import EvaluateSettings
from components.generation import Response
from components.records import Prompt, prompt_text
from components.scoring import load_scorer
from components.tracking import log_artifacts

logger = logging.getLogger(__name__)


def run(
    settings: EvaluateSettings,
    *,
    data: Path,
    policy: Path,
    baseline: Path,
    reward: Path,
    cost: Path | None,
    report: Path,
) -> Metrics:
    """The policy's and the baseline's numbers on the test prompts in `data`, and gate/passed: 1 or 0.

    Writes report.json, report.html and samples.jsonl to `report`. A policy that does not pass is a result
    and no error. Raises InputError for models that cannot be compared, a judge that cannot be asked, a
    threshold on a metric that is not measured, and when there are no prompts.
    """
    folders = {"policy": policy, "baseline": baseline, "reward": reward}
    folders |= {} if cost is None else {"cost": cost}
    _check_kinds(folders)
    judge = Judge(settings.judge) if settings.judge else None
    available = DataDir(data).prompts("test")
    prompts = drawn(available, settings.num_prompts, settings.seed)
    if not prompts:
        raise InputError(f"{data}: no test prompts; raise preprocess.test_share or give it a test source.")
    measured = measurements(cost=cost is not None, judge=judge is not None)
    categories = {prompt.category for prompt in prompts if prompt.category is not None}
    check_names(settings.thresholds, measured, point_names(), categories)
    champion = _champion(settings)
    logger.info(
        "evaluate: %d of %d test prompts, judge: %s", len(prompts), len(available), judge and judge.name
    )
    ours, theirs = _observe_both(settings, data, policy, baseline, prompts)
    answers = _answers(prompts, [*ours.responses, *theirs.responses], reward, cost, judge)
    samples = _samples(settings, prompts, ours, theirs, answers)
    measures = measure(samples, _points(ours, theirs), cost=cost is not None, judge=judge is not None)
    results = checks(settings.thresholds, measures, champion)
    page = Report(settings, samples, measures, results, len(available), _training_scorers(folders)).write(
        report
    )
    inputs = {"data": data, **folders}
    write_manifest(
        report,
        "report",
        counts={"samples": len(samples)},
        settings=settings.model_dump(mode="json"),
        parents=inputs,
    )
    log_artifacts(report)
    passed = all(check.passed for check in results)
    logger.info("evaluate: %s; report in %s", "passed" if passed else "rejected", page)
    return measures.flat() | {"eval/num_prompts": float(len(prompts)), "gate/passed": float(passed)}


def _champion(settings: EvaluateSettings) -> Champion | None:
    """What thresholds over the champion are over; None without such thresholds, or when nothing was served yet.

    Raises InputError when it cannot be read, or was evaluated without what a threshold asks for.
    """
    if not any(bound.over for bound in settings.thresholds.values()):
        return None
    if settings.champion is None:
        raise InputError(
            "evaluate.champion is missing, and thresholds are over the champion; set it to <upload.registry>/"
            "<upload.name>."
        )
    champion = read_champion(settings.champion)
    check_champion(settings.thresholds, champion)
    logger.info("evaluate: champion at %s: %s", settings.champion, champion.version if champion else "none yet")
    return champion


def _check_kinds(folders: Mapping[str, Path]) -> None:
    """Raises InputError where a folder holds another kind of model than its place asks for."""
    for name, folder in folders.items():
        kind, wanted = ModelCard.read(folder).kind, "policy" if name == "baseline" else name
        if kind != wanted:
            raise InputError(
                f"{folder}: evaluate's {name} is a {kind} model (card.json); accepted: {wanted}."
            )


def _observe_both(
    settings: EvaluateSettings, data: Path, policy: Path, baseline: Path, prompts: Sequence[Prompt]
) -> tuple[Contestant, Contestant]:
    """What policy and baseline do with the prompts, one model in memory after the other."""
    tokenizer = common_tokenizer(policy, baseline)
    conversations = [prompt.prompt for prompt in prompts]
    demonstrations = drawn(DataDir(data).demonstrations("test"), settings.num_prompts, settings.seed)
    ours = observe(policy, tokenizer, conversations, demonstrations, settings)
    return ours, observe(baseline, tokenizer, conversations, demonstrations, settings, ours.responses)


def _samples(
    settings: EvaluateSettings,
    prompts: Sequence[Prompt],
    ours: Contestant,
    theirs: Contestant,
    answers: Sequence[Answer],
) -> list[Sample]:
    """Both models' answers side by side; `answers` are the policy's to all prompts, then the baseline's."""
    pairs = zip(answers[: len(prompts)], answers[len(prompts) :], strict=True)
    return [
        Sample(prompt, *pair, outcome(*pair, settings.tie_margin), *divergence(*logprobs))
        for prompt, pair, *logprobs in zip(prompts, pairs, ours.logprobs, theirs.logprobs, strict=True)
    ]


def _answers(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    reward: Path,
    cost: Path | None,
    judge: Judge | None,
) -> list[Answer]:
    """The responses with scores and verdicts; they are the policy's to all prompts, then the baseline's."""
    rewards = _scores(reward, prompts, responses)
    costs: Sequence[float | None] = (
        [None] * len(responses) if cost is None else _scores(cost, prompts, responses)
    )
    bar = statistics.median(rewards[len(prompts) :])
    gold: Sequence[Verdict] = [{}] * len(responses)
    if judge is not None:
        texts = [response.text for response in responses]
        gold = judge.verdicts([prompt_text(row.prompt) for row in prompts] * 2, texts)
    return [
        Answer(response, score, unsafe, _proxy(score, unsafe, bar), verdict)
        for response, score, unsafe, verdict in zip(responses, rewards, costs, gold, strict=True)
    ]


def _scores(folder: Path, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
    """The model's scores of the policy's responses to all prompts, then of the baseline's."""
    scores: list[float] = load_scorer(folder).score([row.prompt for row in prompts] * 2, responses).tolist()
    return scores


def _proxy(reward: float, cost: float | None, bar: float) -> Verdict:
    """What the reward and cost models make of a response; no model here knows honesty or over-refusal."""
    return {"helpful": reward > bar} | ({} if cost is None else {"harmful": cost > 0})


def _points(ours: Contestant, theirs: Contestant) -> Metrics:
    """The numbers that are no means over prompts."""
    points = {}
    for group, contestant in (("eval", ours), ("eval_baseline", theirs)):
        texts = [response.text for response in contestant.responses]
        points[f"{group}/distinct_1"] = distinct(texts, 1)
        points[f"{group}/distinct_2"] = distinct(texts, 2)
        points[f"{group}/perplexity"] = contestant.perplexity
    return points


def _training_scorers(folders: Mapping[str, Path]) -> list[str]:
    """Which of reward and cost are the very models that the policy was trained on, by its manifest."""
    if not (folders["policy"] / MANIFEST).exists():
        return []
    parents = read_manifest(folders["policy"])["parents"]
    return [
        name
        for name in ("reward", "cost")
        if name in folders and parents.get(name) == folder_digest(folders[name])
    ]
