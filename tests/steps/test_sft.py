"""The sft step end to end, on a tiny model and data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components import training
from components.artifacts import DataDir, ModelCard, read_manifest, verify_manifest
from components.errors import InputError
from components.generation import respond
from components.likelihood import demonstration_passages
from components.models import load_policy
from components.settings import Compute, Generation, Lora
from components.sft.settings import SFTSettings
from components.sft.step import run
from components.tokens import load_tokenizer
from components.tracking import Row


@pytest.fixture
def settings(quick_training: Callable[..., Any]) -> Callable[..., SFTSettings]:
    def made(lora: Lora | None = None, **fields: Any) -> SFTSettings:
        return SFTSettings(lora=lora or Lora(), training=quick_training(**({"epochs": 6} | fields)))

    return made


def test_the_policy_learns_the_demonstrations(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(epochs=30), data=data_folder, base=policy_folder, model=tmp_path / "m")
    assert metrics["eval/loss"] < 0.1 * metrics["eval/loss_before"]
    assert metrics["eval/token_accuracy"] > metrics["eval/token_accuracy_before"] + 0.3
    assert metrics["loss/skipped_updates"] == 0
    tokenizer = load_tokenizer(tmp_path / "m")
    prompts = [row.prompt for row in DataDir(data_folder).prompts("test")]
    generation = Generation(temperature=0, max_new_tokens=12)
    answers = respond(load_policy(tmp_path / "m"), tokenizer, prompts, generation, seed=0)
    assert all(answer.ended and answer.text.startswith("yes") for answer in answers)


def test_the_model_folder_says_where_it_comes_from(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    run(settings(epochs=1), data=data_folder, base=policy_folder, model=tmp_path / "m")
    digests = {"data": read_manifest(data_folder)["digest"], "base": read_manifest(policy_folder)["digest"]}
    manifest = read_manifest(tmp_path / "m")
    assert manifest["parents"] == digests and manifest["kind"] == "policy"
    assert manifest["settings"]["training"]["epochs"] == 1
    card = ModelCard.read(tmp_path / "m")
    assert (card.step, card.base) == ("sft", digests["base"])
    verify_manifest(tmp_path / "m")
    assert not list((tmp_path).rglob("checkpoints"))


def test_training_in_bf16_saves_float32_weights_that_learned(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    bf16 = settings(compute=Compute(dtype="bf16", gradient_checkpointing=True))
    metrics = run(bf16, data=data_folder, base=policy_folder, model=tmp_path / "m")
    assert metrics["eval/loss"] < 0.4 * metrics["eval/loss_before"]
    assert load_policy(tmp_path / "m").dtype == torch.float32


def test_adapters_learn_and_are_merged_into_the_saved_model(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(Lora(rank=4)), data=data_folder, base=policy_folder, model=tmp_path / "m")
    assert metrics["eval/loss"] < 0.7 * metrics["eval/loss_before"]
    base, tuned = load_policy(policy_folder), load_policy(tmp_path / "m")
    assert [name for name, _ in tuned.named_parameters()] == [name for name, _ in base.named_parameters()]
    changed = {
        name
        for (name, old), new in zip(base.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed and all(name.endswith("_proj.weight") for name in changed)


def test_interrupted_training_ends_in_the_same_model(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(epochs=2, checkpoint_every=2)
    run(made, data=data_folder, base=policy_folder, model=tmp_path / "a" / "m")

    def stop(metrics: dict[str, float], update: int) -> Row:
        if update == 3:
            raise KeyboardInterrupt
        return Row(update, 0.0, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(training.tracking, "log_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            run(made, data=data_folder, base=policy_folder, model=tmp_path / "b" / "m")
    run(made, data=data_folder, base=policy_folder, model=tmp_path / "b" / "m")
    assert verify_manifest(tmp_path / "a" / "m") == verify_manifest(tmp_path / "b" / "m")


def test_only_the_response_and_its_end_are_learned(data_folder: Path, policy_folder: Path) -> None:
    tokenizer = load_tokenizer(policy_folder)
    demonstrations = DataDir(data_folder).demonstrations("train")
    for row, demonstration in zip(
        demonstration_passages(demonstrations, tokenizer, 64), demonstrations, strict=True
    ):
        learned = tokenizer.decode(row.ids[row.start :])
        assert learned == demonstration.response + "<|end|>"
    assert all(
        len(row.ids) <= 12 and row.start >= 1 for row in demonstration_passages(demonstrations, tokenizer, 12)
    )


def test_a_base_without_a_tokenizer_is_an_error(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    load_policy(policy_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"bare: no tokenizer .*Copy the tokenizer"):
        run(settings(), data=data_folder, base=tmp_path / "bare", model=tmp_path / "m")


def test_no_demonstrations_is_an_error_that_says_what_to_set(
    settings: Any, policy_folder: Path, tmp_path: Path
) -> None:
    DataDir.write(tmp_path / "empty", {}, {}, {})
    with pytest.raises(InputError, match=r"empty: no demonstrations.*preprocess\.demonstrations"):
        run(settings(), data=tmp_path / "empty", base=policy_folder, model=tmp_path / "m")
