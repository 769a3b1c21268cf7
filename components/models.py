"""Models on disk and in memory: policies (causal language models) and scalar models (reward, cost, value).

Shapes: B rows, N places.
"""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from components.adapters import adapter_tensors, base_of, has_adapters, merged_tensors, write_adapter
from components.artifacts import ADAPTER, LANGUAGE_MODELS, MEMBERS, ModelCard, read_json, write_manifest
from components.blocks import slim
from components.errors import InputError
from components.gathering import gathered
from components.packed import Packed, backbone, pack, whole_rows
from components.products import quicken
from components.ranks import Ranks, join
from components.settings import Lora
from components.tokens import Tokenizer, load_tokenizer, template_digest
from components.zero import divided

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device() -> torch.device:
    """Where this process computes: its GPU when it has one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """The arithmetic of training in `dtype`, for models that are only read: they must not differ by it."""
    return torch.autocast(device().type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def load_policy(folder: Path, dtype: str = "fp32", *, divide: bool = False) -> Any:
    """The causal language model in `folder`, in eval mode, dropout off, on this process's device.

    To `divide` it is to keep a part of every weight alone, as all processes that were started together do (ZeRO-3).

    Raises InputError when the folder does not hold one in safetensors.
    """
    from transformers import AutoModelForCausalLM

    stated = _architectures(folder)
    if stated and not any(name.endswith(LANGUAGE_MODELS) for name in stated):
        raise InputError(
            f"{folder}: config.json says architectures {', '.join(stated)}: saved without a language-model head, which "
            "would be random. Take the folder of a causal language model."
        )
    with torch.random.fork_rng(devices=[]):  # a tied head that is divided is drawn at random before it is tied
        model = _load(AutoModelForCausalLM, folder, dtype, divide)
    disable_dropout(model)
    return model.eval().to(device())


def end_ids(model: Any, eos_token_id: int) -> list[int]:
    """The tokens that end a response: the tokenizer's, and those the model's generation config names.

    Models whose turns end with another token than the tokenizer's own (Gemma, Phi) state it there.
    """
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = stated if isinstance(stated, list) else [] if stated is None else [stated]
    return sorted({eos_token_id, *more})


class ScalarModel(nn.Module):
    """A sequence-classification model with one label, read token by token.

    The score of a row is the head's output at its last token, found by the row's length and never by comparing
    ids with the pad id (as Hugging Face's own forward pass does, which is wrong when pad is eos). Normalisation
    (mean, std) comes from card.json and is applied in float32.
    """

    def __init__(self, model: Any, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise InputError(
                f"{type(model).__name__} has no linear head named 'score'; plumbline reads scalar models of the "
                "Llama, Mistral, Qwen, Gemma and GPT-2 families."
            )
        with gathered([model.score.weight]):
            model.score.weight = nn.Parameter(model.score.weight.detach().float().clone())  # PEFT copies it
        self.model, self.mean, self.std = model, mean, std

    def forward(self, packed: Packed, places: Tensor) -> Tensor:
        """Normalised scores (N,) at some places of what is read, such as `packed.ends`."""
        hidden = backbone(self.model)(**packed.inputs())[0].flatten(0, 1)[places]
        head = (self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model).score
        return normalised(head, hidden, self.mean, self.std)

    def score(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised scores (B,) at the last attended token of each row, whichever side is padded."""
        packed = pack(self.model, whole_rows(input_ids, mask))
        return self(packed, packed.ends)  # type: ignore[no-any-return]


def normalised(head: nn.Module, hidden: Tensor, mean: float, std: float) -> Tensor:
    """Scores (N,) of hidden states (N, H), in float32 whatever the backbone computes in."""
    with torch.autocast(hidden.device.type, enabled=False):
        raw: Tensor = head(hidden.float()).squeeze(-1)
    return (raw - mean) / std


def load_scalar(folder: Path, dtype: str = "fp32", *, divide: bool = False) -> ScalarModel:
    """The reward or cost model in `folder`, normalised as its card says, in eval mode, dropout off.

    To `divide` it is as in `load_policy`, but for the head, of which every process has all.

    Raises InputError when the folder holds a policy: it would get a head of random weights.
    """
    from transformers import AutoModelForSequenceClassification

    card = ModelCard.read(folder)
    if card.kind == "policy":
        raise InputError(f"{folder}: card.json says kind 'policy'; accepted: a reward or cost model's folder.")
    model = _load(AutoModelForSequenceClassification, folder, dtype, divide)
    disable_dropout(model)
    return ScalarModel(model, card.score_mean, card.score_std).eval().to(device())


def scalar_from_policy(folder: Path, *, divide: bool = False) -> ScalarModel:
    """A scalar model on the policy's backbone, its head at zero: every first score is 0 and no pair is preferred.

    To `divide` it is as in `load_scalar`.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(folder)
    config = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    model = _load(AutoModelForSequenceClassification, folder, "fp32", divide, **config)
    scalar = ScalarModel(model)
    nn.init.zeros_(model.score.weight)
    disable_dropout(model)
    return scalar.to(device())


def with_lora(model: Any, lora: Lora, task_type: str = "CAUSAL_LM") -> Any:
    """The model with trainable low-rank adapters on every linear layer of its blocks; itself when rank is 0.

    `task_type` SEQ_CLS keeps a scalar model's head trainable.
    """
    if lora.rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    sizes: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return get_peft_model(model, LoraConfig(**sizes, target_modules="all-linear", task_type=task_type))


def save_model(
    model: Any,
    tokenizer: Tokenizer,
    folder: Path,
    card: ModelCard,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, Path],
    members: Iterable[tuple[Any, ModelCard]] = (),
) -> str:
    """Write a Hugging Face folder (safetensors, float32, adapters merged) with card and manifest.

    A scalar model with adapters is also written apart from its base, in adapter/: its adapter and its head.
    `members`, models trained alike, are written below it as members/1 and so on, in the same form but under the one
    manifest. Returns the folder's digest, which depends on content alone. Where several processes train, all of them
    call it and the first one writes: weights that lie in parts come together on its CPU, one layer after the other.
    """
    ranks = join()
    ranks.first(lambda: shutil.rmtree(folder) if folder.exists() else None)
    _write(model, tokenizer, folder, card, ranks)
    for number, (member, its_card) in enumerate(members, start=1):
        _write(member, tokenizer, folder / MEMBERS / str(number), its_card, ranks)
    return ranks.first(lambda: write_manifest(folder, card.kind, settings=settings, parents=parents))


def policy_card(base: str, step: str, tokenizer: Tokenizer) -> ModelCard:
    """The card of a policy that `step` trained from the model with digest `base`."""
    return ModelCard("policy", base, step, template_digest(tokenizer))


def _architectures(folder: Path) -> list[str]:
    """The classes that config.json names; none where it does not say."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: no config.json; not a Hugging Face model folder.")
    return list(read_json(folder / "config.json").get("architectures") or [])


def _write(model: Any, tokenizer: Tokenizer, folder: Path, card: ModelCard, ranks: Ranks) -> None:
    apart = adapter_tensors(model) if card.kind != "policy" and has_adapters(model) else None
    tensors = merged_tensors(model)

    def written() -> None:
        try:
            if apart is not None:
                write_adapter(model, apart, folder / ADAPTER)
            base_of(model).save_pretrained(str(folder), state_dict=tensors, safe_serialization=True)
        except SafetensorError as error:  # what its writer makes of a full disk
            raise InputError(
                f"{folder}: the model cannot be written: {error}. Make room there and start again."
            ) from error
        tokenizer.save_pretrained(str(folder))
        card.write(folder)

    ranks.first(written)


def _load(auto_class: Any, folder: Path, dtype: str, divide: bool, **config: Any) -> Any:
    """from_pretrained on a local folder: safetensors only, no remote code."""
    _architectures(folder)
    given = {"dtype": TORCH_DTYPES[dtype], "use_safetensors": True, "trust_remote_code": False} | config
    try:
        with divided() if divide else nullcontext():
            model = auto_class.from_pretrained(str(folder), **given)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: the model cannot be loaded ({reason}). Weights must be in safetensors.") from None
    quicken(model)
    slim(model)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off for good: old and new log-probabilities must come from the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):  # a rate for torch.nn.functional.dropout
                setattr(module, name, 0.0)
