"""Answering prompts with what is deployed, after checking that it is what was promoted."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.artifacts import DataDir, Metrics, ModelCard, content_digest, write_manifest
from components.cluster import annotated_digest
from components.errors import InputError
from components.generation import Response, respond
from components.infer.prompts import read_prompts
from components.infer.settings import InferSettings
from components.models import load_policy
from components.precision import serving_dtype
from components.records import Conversation, Prompt
from components.release import Deployment, Release
from components.scoring import load_scorer
from components.serving.folder import read_pointer
from components.storage import fetch, local_path
from components.tokens import Tokenizer, load_tokenizer, template_digest

logger = logging.getLogger(__name__)

RESPONSES = "responses.jsonl"


def run(
    settings: InferSettings,
    *,
    data: Path,
    release: Path,
    deployment: Path,
    reward: Path,
    cost: Path | None,
    responses: Path,
) -> Metrics:
    """Answer the prompts with the deployed model; writes responses.jsonl to `responses`.

    Raises InputError when what is deployed is not the release, and for a malformed prompt file.
    """
    prompts = _prompts(settings, data)
    conversations = [prompt.prompt for prompt in prompts]
    with _deployed(Release.read(release), Deployment.read(deployment)) as (folder, digest):
        tokenizer = _tokenizer(folder)
        logger.info("infer: %d prompts, model %s in %s", len(prompts), digest, folder)
        model = load_policy(folder, serving_dtype())
        answers = respond(model, tokenizer, conversations, settings.generation, settings.seed)
    scores = _scores({"reward": reward, "cost": cost}, conversations, answers)
    _write(responses / RESPONSES, prompts, answers, scores, digest)
    parents = {"data": data, "release": release, "deployment": deployment, "reward": reward}
    write_manifest(
        responses,
        "responses",
        counts={"responses": len(answers)},
        settings=settings.model_dump(mode="json"),
        parents=parents if cost is None else parents | {"cost": cost},
    )
    return {
        "infer/num_responses": float(len(answers)),
        "infer/ended": _mean([answer.ended for answer in answers]),
        "infer/num_tokens": _mean([answer.num_tokens for answer in answers]),
        **{f"infer/{name}": _mean(values) for name, values in scores.items()},
    }


def _prompts(settings: InferSettings, data: Path) -> list[Prompt]:
    """The user's prompts, or the first of the data's test split. Raises InputError when there is none."""
    if settings.prompts:
        try:
            path = fetch(settings.prompts)
        except InputError as error:
            raise InputError(f"infer.prompts: {error}") from None
        return read_prompts(path)
    prompts = DataDir(data).prompts("test")[: settings.limit]
    if not prompts:
        raise InputError(f"{data}: no test prompts to answer; set infer.prompts to a file.")
    return prompts


@contextmanager
def _deployed(release: Release, deployment: Deployment) -> Iterator[tuple[Path, str]]:
    """The folder that is served and its digest, computed anew from its files.

    Target kserve has no folder within reach: what its pods fetch is fetched here, and the cluster is asked which
    digest it was told. Raises InputError naming both digests when one of them is not the release's.
    """
    _check(f"the {deployment.target} deployment", deployment.digest, release)
    if deployment.service is not None:
        _check_service(deployment.service, deployment.applied, release)
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        if deployment.serving_dir is None:
            folder = fetch(release.uri, into=Path(scratch))
        else:
            serving = local_path(deployment.serving_dir)
            folder = serving / read_pointer(serving).path
        digest = content_digest(folder)[1]
        _check(str(folder), digest, release)
        yield folder, digest


def _check_service(service: str, applied: bool, release: Release) -> None:
    """Raise InputError when the cluster says that the InferenceService serves something else."""
    digest = annotated_digest(service) if applied else None
    if digest is not None:
        _check(f"the InferenceService {service}", digest, release)
        return
    unknown = "the cluster does not say what it serves" if applied else "its manifest was not applied by deploy"
    logger.warning("infer: %s: %s; the answers are those of the published files", service, unknown)


def _check(what: str, digest: str, release: Release) -> None:
    if digest != release.digest:
        raise InputError(
            f"{what} is deployed with the digest {digest}, but the promoted model's is {release.digest}. "
            "Something else was deployed, or the files were altered: deploy the release again."
        )


def _tokenizer(folder: Path) -> Tokenizer:
    """The model's tokenizer. Raises InputError when its chat template is not that of the training."""
    tokenizer, card = load_tokenizer(folder), ModelCard.read(folder)
    if (found := template_digest(tokenizer)) != card.template_digest:
        raise InputError(
            f"{folder}: the chat template has the digest {found}; the model was trained with "
            f"{card.template_digest}. Publish the model with the tokenizer it was trained with."
        )
    return tokenizer


def _scores(
    models: Mapping[str, Path | None], prompts: Sequence[Conversation], responses: Sequence[Response]
) -> dict[str, list[float]]:
    """The scores of every response by the models that are there."""
    present = {name: folder for name, folder in models.items() if folder is not None}
    return {name: load_scorer(folder).score(prompts, responses).tolist() for name, folder in present.items()}


def _write(
    path: Path,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    scores: Mapping[str, Sequence[float]],
    digest: str,
) -> None:
    """One JSON object per line: the prompt (its text, or its messages if several) and its response."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            row = {
                "id": prompt.id,
                "prompt": _plain(prompt.prompt),
                "response": response.text,
                "ended": response.ended,
                "scores": {name: values[index] for name, values in scores.items()},
                "model_digest": digest,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _plain(prompt: Conversation) -> Any:
    if len(prompt) == 1:
        return prompt[0].content
    return [asdict(message) for message in prompt]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
