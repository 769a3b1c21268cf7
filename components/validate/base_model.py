"""The base model's folder, checked without loading its weights: files, configuration, tokenizer, template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import LANGUAGE_MODELS
from components.errors import InputError
from components.tokens import Tokenizer, load_tokenizer
from components.validate.findings import Findings, Place

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What is known of the base model; a part that could not be read is None."""

    config: Any
    """Its Hugging Face configuration."""
    tokenizer: Tokenizer


def check_base_model(base: Path, max_length: int, findings: Findings) -> BaseModel:
    """The configuration and tokenizer of the folder; what is wrong with it goes to the findings."""
    if not base.is_dir():
        findings.error(
            "base model", Place(str(base)), None, "no such folder; give base.model a model's folder"
        )
        return BaseModel(None, None)
    config, tokenizer = _config(base, findings), _tokenizer(base, findings)
    _check_weights(base, findings)
    _check_template(base, findings)
    if config is not None:
        _check_positions(config, max_length, findings)
    if config is not None and tokenizer is not None:
        _check_vocabulary(config, tokenizer, findings)
    return BaseModel(config, tokenizer)


def _config(base: Path, findings: Findings) -> Any:
    """The configuration, when it is of a causal language model that transformers knows."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    place = _place(CONFIG)
    if not (base / CONFIG).is_file():
        findings.error("base model", place, None, f"no such file in {base}; not a Hugging Face model folder")
        return None
    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes of it, the person should read it here
        reason = str(error).strip().splitlines()[0]
        findings.error(
            "base model", place, None, f"cannot be read (code in the folder is never run): {reason}"
        )
        return None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        problem = "not a causal language model that transformers knows; take a decoder such as Llama or Qwen"
        findings.error("base model", place, "model_type", problem, config.model_type)
        return None
    stated = config.architectures or []
    if stated and not any(name.endswith(LANGUAGE_MODELS) for name in stated):
        problem = "saved without a language-model head; take the folder of a causal language model"
        findings.error("base model", place, "architectures", problem, ", ".join(stated))
    return config


def _tokenizer(base: Path, findings: Findings) -> Tokenizer | None:
    try:
        return load_tokenizer(base)
    except InputError as error:
        findings.error("base model", _place("tokenizer.json"), None, str(error))
    return None


def _check_weights(base: Path, findings: Findings) -> None:
    """Every safetensors file must be there with its whole length: its header tells where its data ends."""
    from safetensors import SafetensorError, safe_open

    for name in _weight_files(base, findings):
        path = base / name
        if not path.is_file():
            findings.error("base model", _place(name), None, f"{INDEX} names this file, and it is not there")
            continue
        try:
            with safe_open(str(path), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            problem = f"not a whole safetensors file ({error}); download or copy it again"
            findings.error("base model", _place(name), None, problem)


def _weight_files(base: Path, findings: Findings) -> list[str]:
    if (base / WEIGHTS).exists():
        return [WEIGHTS]
    if (base / INDEX).exists():
        try:
            return sorted(set(json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            findings.error(
                "base model", _place(INDEX), "weight_map", "is not readable; download the file again"
            )
            return []
    pickles = sorted(path.name for path in base.glob("*.bin"))
    problem = "no safetensors weights"
    if pickles:
        problem += (
            "; .bin weights are pickles, which may run code and are not loaded. Convert them once: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    findings.error("base model", _place(WEIGHTS), None, problem, ", ".join(pickles) or None)
    return []


def _check_template(base: Path, findings: Findings) -> None:
    """A missing chat template is no error: load_tokenizer puts the default in its place."""
    if (base / "chat_template.jinja").is_file():
        return
    try:
        stated = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stated = {}
    if not isinstance(stated, dict) or not stated.get("chat_template"):
        problem = "the model has no chat template; Human/Assistant transcripts are used"
        findings.warn("base model", _place("tokenizer_config.json"), "chat_template", problem)


def _check_positions(config: Any, max_length: int, findings: Findings) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        problem = (
            f"fewer positions than validate.max_length ({max_length}); lower max_length or take another model"
        )
        findings.error("base model", _place(CONFIG), "max_position_embeddings", problem, positions)


def _check_vocabulary(config: Any, tokenizer: Tokenizer, findings: Findings) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        problem = (
            f"the tokenizer has {len(tokenizer)} tokens, more than the embedding has rows; take both from "
            "one model"
        )
        findings.error("base model", _place(CONFIG), "vocab_size", problem, rows)


def _place(name: str) -> Place:
    return Place(f"base/{name}")
