"""The model that is served, and the place where it can be exchanged while requests are answered."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from components.artifacts import MANIFEST, content_digest, read_manifest, verify_manifest
from components.errors import InputError
from components.release import version_of
from components.serving.folder import POINTER, Pointer, read_pointer
from components.tokens import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 2048
"""Tokens of prompt and response for a model whose configuration does not say."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded model with all a request needs; whoever holds it can finish with it, whatever replaces it."""

    name: str
    version: str
    digest: str
    created: int
    """When it was deployed, in seconds since 1970."""
    model: Any
    tokenizer: Tokenizer
    ends: frozenset[int]
    """Ids of the tokens that end a response."""
    context: int
    """Tokens of prompt and response together."""


class Stage:
    """Holds the model that new requests get."""

    def __init__(self, model: ServedModel) -> None:
        self.current = model


def load_folder(folder: Path) -> ServedModel:
    """The model that a serving folder points at, or the one in a plain model folder.

    Raises InputError when the folder holds neither, or files that differ from their manifest.
    """
    if (folder / "config.json").exists() and not (folder / POINTER).exists():
        return _load_plain(folder)
    return load_version(folder, read_pointer(folder))


def load_version(folder: Path, pointer: Pointer) -> ServedModel:
    """The version that a serving folder's pointer names. Raises InputError when its files are not those."""
    place = folder / pointer.path
    if (digest := verify_manifest(place)) != pointer.digest:
        raise InputError(f"{place} has the digest {digest}; {folder / POINTER} says {pointer.digest}. Deploy again.")
    return _load(place, pointer.name, digest, datetime.fromisoformat(pointer.deployed))


def _load_plain(folder: Path) -> ServedModel:
    """A model folder: a published version (as KServe mounts it), a step's output, any Hugging Face model."""
    name = folder.absolute().name
    if (folder / MANIFEST).exists():
        digest = verify_manifest(folder)
        name = read_manifest(folder)["settings"].get("name", name)
    else:
        digest = content_digest(folder)[1]
    changed = datetime.fromtimestamp((folder / "config.json").stat().st_mtime)
    return _load(folder, name, digest, changed)


def _load(folder: Path, name: str, digest: str, created: datetime) -> ServedModel:
    from components.models import load_policy
    from components.precision import serving_dtype
    from components.tokens import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, serving_dtype())
    served = ServedModel(
        name=name,
        version=version_of(digest),
        digest=digest,
        created=int(created.timestamp()),
        model=model,
        tokenizer=tokenizer,
        ends=_ends(model, tokenizer),
        context=getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_CONTEXT),
    )
    _try_out(served, [tokenizer.eos_token_id])
    logger.info("loaded %s %s from %s", name, digest, folder)
    return served


def _ends(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's end-of-sequence token, and those that the model's generation configuration adds."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    more = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return frozenset([tokenizer.eos_token_id, *more])


def _try_out(served: ServedModel, ids: Sequence[int]) -> None:
    """Decode one token, so that what cannot work fails here and not in the first request."""
    from components.serving.stream import sample_tokens
    from components.settings import Generation

    list(sample_tokens(served.model, ids, Generation(max_new_tokens=1, temperature=0), seed=0))
