"""Low-rank adapters in PEFT's form: kept apart beside a merged model, and several of them on one backbone.

One adapter is a model's own, which is trained, merged and saved. Others may be its guests: frozen, read while they are
switched to and absent otherwise, so that models that differ by adapters alone have one backbone in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.artifacts import read_json, write_json
from components.errors import InputError
from components.gathering import copied, gathered
from components.ranks import is_first

OWN = "default"
"""The name of a model's own adapter; PEFT's default."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "base_model.model.score.weight"
"""A scalar model's head, which PEFT saves with the adapter that it was trained with."""
ADAPTED = ".base_layer.weight"
"""Behind the name of a layer with adapters: its own weight."""


def has_adapters(model: Any) -> bool:
    """Whether PEFT has put adapters on the model."""
    return hasattr(model, "peft_config")


def base_of(model: Any) -> Any:
    """The Hugging Face model below the adapters; the model itself where it has none."""
    return model.get_base_model() if has_adapters(model) else model


@torch.no_grad()
def merged_tensors(model: Any) -> dict[str, Tensor]:
    """What the model is saved as: weights by name on the CPU, its own adapter merged into them, without guests.

    The model stays as it is. Where its weights lie in parts, one layer after the other is gathered, and the first
    process alone has the result.
    """
    base, found = base_of(model), dict[str, Tensor]()
    plain: dict[str, Tensor] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if (saved := _saved_name(name)) is None:
            continue
        if not name.endswith(ADAPTED):
            plain[saved] = tensor
            continue
        layer = base.get_submodule(name.removesuffix(ADAPTED))
        with gathered([tensor, layer.lora_A[OWN].weight, layer.lora_B[OWN].weight]):
            if is_first():
                found[saved] = (tensor + layer.get_delta_weight(OWN)).cpu()
    return found | copied(plain)


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The weights of the model's own adapter, and of the head trained with it, by PEFT's names; else as `copied`."""
    return copied({name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if f".{OWN}." in name})


def write_adapter(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write `adapter_tensors` as PEFT does; equal weights make equal files.

    PEFT itself writes where the base model was loaded from, its own version and sets in random order.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, tensors, adapter_name=OWN, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    stated = model.peft_config[OWN].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in stated.items()}
    write_json(folder / CONFIG, {key: plain[key] for key in sorted(plain) if key != "peft_version"})


def add_guest(model: Any, folder: Path, name: str) -> nn.Linear:
    """Put a scalar model's adapter in `folder` on the model, frozen, as guest `name`; returns its head.

    The model's own adapter stays active and as trainable as it was; no random number is drawn. Raises InputError when
    the folder's files are not those of an adapter for this model.
    """
    from peft import set_peft_model_state_dict

    config, tensors = _read(folder)
    weight = tensors.pop(HEAD, None)
    if weight is None:
        raise _unusable(folder, f"{WEIGHTS} holds no {HEAD}")
    before = list(model.named_parameters())
    flags = [(parameter, parameter.requires_grad) for _, parameter in before]
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws first weights, on the CPU
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _unusable(folder, str(error).strip().partition("\n")[0]) from None
    known = {known for known, _ in before}
    added = {key: parameter for key, parameter in model.named_parameters() if key not in known}
    if missing := [key for key, parameter in added.items() if parameter.is_meta] + list(result.unexpected_keys):
        raise _unusable(folder, f"{missing[0]} is not in both the adapter and the model")
    _restore(flags)
    for parameter in added.values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(model.device)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight.to(model.device, torch.float32), requires_grad=False)
    return head


@contextmanager
def switched(model: Any, name: str) -> Iterator[None]:
    """The model with guest `name` in the place of its own adapter, which is back afterwards, as trainable as before."""
    before = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(name, inference_mode=True)
        yield
    finally:
        model.set_adapter(before)
        _restore(flags)  # PEFT freezes what is not active and thaws what is


def _read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration, without the head, and the tensors. Raises InputError when they cannot be read."""
    from peft import LoraConfig

    stated = read_json(folder / CONFIG)
    try:
        if (kind := stated.get("peft_type")) != "LORA":
            raise ValueError(f"{CONFIG} says peft_type {kind!r}; accepted: LORA")
        # in inference mode PEFT would freeze the model's own adapter with the new one
        reader = {"task_type": None, "modules_to_save": None, "lora_dropout": 0.0, "inference_mode": False}
        return LoraConfig.from_peft_type(**(stated | reader)), load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise _unusable(folder, str(error).strip().partition("\n")[0]) from None


def _saved_name(name: str) -> str | None:
    """What a tensor of a model with adapters is called without them; None for what is then not there."""
    parts = name.split(".")
    if "original_module" in parts or any(part.startswith("lora_") for part in parts):
        return None
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        if parts[place + 1] != OWN:
            return None
        del parts[place : place + 2]
    return ".".join(part for part in parts if part != "base_layer")


def _unusable(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder}: the adapter cannot be used ({reason}). Train the model again, or remove the folder adapter/ with "
        "its lines in manifest.json: the merged model beside it is whole."
    )


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trainable in flags:
        parameter.requires_grad_(trainable)
