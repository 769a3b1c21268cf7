"""The base model: fetched by name, folder or address, or a small one trained here from text."""

import logging
import random
from pathlib import Path
from typing import Any

import torch

from components.artifacts import DataDir, Metrics
from components.base.architecture import PAD, train_tokenizer, untrained_llama
from components.base.documents import Document, contents, data_documents, file_documents
from components.base.settings import BaseSettings
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.likelihood import Likelihood, Passage, evaluate_likelihood
from components.logprobs import LanguageModel
from components.models import load_policy, policy_card, save_model
from components.ranks import join
from components.storage import fetch, is_remote, local_path
from components.tokens import load_tokenizer
from components.training import fit

logger = logging.getLogger(__name__)


def run(settings: BaseSettings, *, raw: Path | None, data: Path, base: Path) -> Metrics:
    """Put a base model into `base`: a Hugging Face folder with tokenizer, chat template and pad token.

    Raises InputError when the named model cannot be found or holds no tokenizer.
    """
    torch.manual_seed(settings.seed)
    if settings.model:
        return _adopt(settings, base)
    if settings.text:
        text = fetch(settings.text, beside=raw)
        return _train(settings, file_documents(text), {"text": text}, base)
    documents = data_documents(DataDir(data))
    if len(documents) < 2:
        raise InputError(f"{data}: no text to train a base model from; set base.model or base.text.")
    return _train(settings, documents, {"data": data}, base)


def _adopt(settings: BaseSettings, base: Path) -> Metrics:
    """Copy a given model, giving it what later steps rely on: a pad token of its own and a chat template."""
    folder = _folder(settings.model)
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
        logger.info("the model's tokenizer padded with its end token; it got a pad token of its own, %s", PAD)
    card = policy_card(settings.model, "base", tokenizer)
    save_model(model, tokenizer, base, card, settings=settings.model_dump(mode="json"), parents={})
    return {"base/num_parameters": float(model.num_parameters())}


def _folder(name: str) -> Path:
    """The local folder of a model named by path, address or Hugging Face name."""
    if is_remote(name) or local_path(name).exists():
        return fetch(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"base.model is {name!r}: no such folder, and the hub gave none ({reason}). Accepted: a folder, a gs:// "
            "address, a Hugging Face model name, or nothing to train a small model from the data."
        ) from None


def _train(settings: BaseSettings, documents: list[Document], inputs: dict[str, Path], base: Path) -> Metrics:
    """A tokenizer and a small model, trained on the documents."""
    tokenizer = train_tokenizer((text for row in documents for text in contents(row)), settings.vocab_size)
    model = untrained_llama(settings.size, tokenizer, settings.max_positions)
    random.Random(settings.seed).shuffle(documents)
    split = max(1, round(settings.test_share * len(documents)))
    training = settings.training
    held_out, rows = (
        _passages(part, tokenizer, training.max_length) for part in (documents[:split], documents[split:])
    )
    logger.info("base: %d documents, %d parameters, %d tokens", len(rows), model.num_parameters(), len(tokenizer))
    settings_dict = settings.model_dump(mode="json")
    checkpoints = Checkpoints.of(
        "base", settings_dict, inputs, base, training.checkpoint_every, training.keep_checkpoints
    )
    card = policy_card("", "base", tokenizer)
    reader, ranks = LanguageModel(model), join()
    metrics = fit(
        reader,
        Likelihood(),
        rows,
        training,
        seed=settings.seed,
        label="base",
        evaluate=lambda: evaluate_likelihood(reader, held_out, training.batch_tokens, ranks),
        checkpoints=checkpoints,
        finish=lambda _: save_model(model, tokenizer, base, card, settings=settings_dict, parents=inputs),
        ranks=ranks,
    )
    checkpoints.clear()
    return metrics | {"base/num_parameters": float(model.num_parameters()), "base/vocab_size": float(len(tokenizer))}


def _passages(documents: list[Document], tokenizer: Any, max_length: int) -> list[Passage]:
    """Documents as token ids, all learned but the first; a document longer than `max_length` is cut into pieces."""
    rows = []
    for document in documents:
        if isinstance(document, str):
            ids = [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        else:
            messages = [{"role": message.role, "content": message.content} for message in document]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - 1, max_length):
            rows.append(Passage(ids[start : start + max_length], 1))
    return [row for row in rows if len(row.ids) > 1]
