"""What a run is put together from: the folders it reads, its networks and its reference."""

from pathlib import Path
from typing import Any, NamedTuple

from components.errors import InputError
from components.models import ScalarModel, device, load_policy, load_scalar, scalar_from_policy, with_lora
from components.rl.algorithm_settings import DPOSettings
from components.rl.networks import Networks, SharedHead
from components.rl.reference import AdapterOff, FrozenReference, Reference
from components.rl.settings import RLSettings
from components.tokens import load_tokenizer


class Folders(NamedTuple):
    """What a run reads."""

    data: Path
    policy: Path
    """As it starts."""
    reward: Path | None
    cost: Path | None


def build_networks(settings: RLSettings, policy: Path, reward: Path | None, cost: Path | None) -> Networks:
    """The policy and its critics, as they start: from the scalar models, or as heads on the policy.

    Where scores come from elsewhere and there is no scalar model, the critic starts from the policy.
    Labelled pairs were sampled at no temperature: dpo compares plain log-probabilities. Raises InputError when a
    critic would read the policy's tokens by another vocabulary.
    """
    divide = settings.compute.strategy == "zero3"
    model = with_lora(load_policy(policy, divide=divide), settings.lora)
    folders = {"value": reward, "cost_value": cost}
    temperature = 1.0 if isinstance(settings.algorithm, DPOSettings) else settings.generation.temperature

    def critic(name: str) -> ScalarModel | SharedHead | None:
        if name not in settings.critics:
            return None
        if settings.share_backbone:
            return SharedHead(model.config.hidden_size).to(device())
        folder = folders[name]
        if folder is None:
            return scalar_from_policy(policy, divide=divide)
        _check_vocabulary(policy, folder)
        return load_scalar(folder, divide=divide)

    return Networks(model, critic("value"), critic("cost_value"), temperature)


def _check_vocabulary(policy: Path, scalar: Path) -> None:
    if load_tokenizer(policy).get_vocab() != load_tokenizer(scalar).get_vocab():
        raise InputError(
            f"{scalar}: its vocabulary is not that of the policy in {policy}, whose tokens the critic that starts from "
            "it would read. Train it from the policy's own base, set rl.share_backbone to true, or take an algorithm "
            "without a critic."
        )


def build_reference(settings: RLSettings, policy: Any, folder: Path) -> Reference:
    """The policy as it started from the folder: with adapters, the policy without them; else a copy."""
    if settings.lora.rank:
        return AdapterOff(policy, settings.compute.dtype)
    return FrozenReference(load_policy(folder, settings.frozen_dtype), settings.compute.dtype)
