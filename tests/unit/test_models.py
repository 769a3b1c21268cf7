"""Policies and scalar models: padding, positions, adapters, dropout, and what is saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from components.artifacts import MANIFEST, ModelCard, verify_manifest
from components.errors import InputError
from components.logprobs import response_logprobs
from components.models import (
    ScalarModel,
    disable_dropout,
    load_policy,
    load_scalar,
    policy_card,
    save_model,
    scalar_from_policy,
    with_lora,
)
from components.settings import Lora
from components.tokens import load_tokenizer, pad

ROWS = [[10, 11, 12, 13, 14], [20, 21], [30, 31, 32]]


@pytest.fixture
def policy(policy_folder: Path) -> Any:
    return load_policy(policy_folder)


def logits(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits


@torch.no_grad()
def test_a_score_is_the_same_alone_padded_left_and_padded_right(reward_folder: Path) -> None:
    scalar = load_scalar(reward_folder)
    alone = torch.cat([scalar.score(*pad([row], 0)) for row in ROWS])
    for side in ("left", "right"):
        torch.testing.assert_close(scalar.score(*pad(ROWS, 0, side)), alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 0.01


@torch.no_grad()
def test_scores_are_hugging_face_s_own_logits_normalised_by_the_card(reward_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(str(reward_folder)).eval()
    ids, mask = pad(ROWS, theirs.config.pad_token_id)
    raw = theirs(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
    assert theirs.config.num_labels == 1
    ours = load_scalar(reward_folder).score(ids, mask)
    torch.testing.assert_close(ours, (raw - 0.5) / 2.0, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_end_token_equal_to_the_filler_is_scored(reward_folder: Path) -> None:
    scalar, eos = load_scalar(reward_folder), load_tokenizer(reward_folder).eos_token_id
    closed = [[*row, eos] for row in ROWS]
    alone = torch.cat([scalar.score(*pad([row], eos)) for row in closed])
    torch.testing.assert_close(scalar.score(*pad(closed, eos)), alone, atol=1e-5, rtol=1e-5)
    assert (scalar.score(*pad(ROWS, eos)) - alone).abs().min() > 1e-4


@torch.no_grad()
def test_a_filler_inside_a_prompt_is_a_token_like_any_other(policy: Any) -> None:
    eos = 1
    rows = [[10, eos, 11, 12], [eos, 21]]
    ids, mask = pad(rows, eos, side="left")
    together, _ = response_logprobs(policy, ids, mask, 1)
    for place, row in enumerate(rows):
        alone, _ = response_logprobs(
            policy, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), 1
        )
        torch.testing.assert_close(together[place : place + 1], alone, atol=1e-5, rtol=1e-5)
    without, _ = response_logprobs(
        policy, torch.tensor([[10, 11, 12]]), torch.ones(1, 3, dtype=torch.bool), 1
    )
    assert (without - together[:1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_response_logprobs_equal_a_naive_softmax_over_the_whole_sequence(
    policy: Any, temperature: float
) -> None:
    prompt, response = [10, 11, 12], [40, 41, 42, 43]
    row = prompt + response
    ids, mask = pad([row, [9, *row]], 0, side="left")
    logprobs, entropy = response_logprobs(policy, ids, mask, len(response), temperature)
    naive = (logits(policy, row)[0].double() / temperature).softmax(-1)
    for place, token in enumerate(response):
        distribution = naive[len(prompt) + place - 1]
        assert logprobs[0, place].item() == pytest.approx(distribution[token].log().item(), abs=1e-4)
        expected = -(distribution * distribution.log()).sum().item()
        assert entropy[0, place].item() == pytest.approx(expected, abs=1e-4)


def test_adapters_start_as_no_change_and_train_alone(policy: Any) -> None:
    before = logits(policy, ROWS[0])
    adapted = with_lora(policy, Lora(rank=4))
    assert torch.equal(logits(adapted, ROWS[0]), before)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_rank_zero_leaves_the_model_as_it_is(policy: Any) -> None:
    assert with_lora(policy, Lora(rank=0)) is policy


def randomise_adapters(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


def test_a_saved_policy_has_its_adapters_merged(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = logits(policy, ROWS[0])
    adapted = with_lora(policy, Lora(rank=4))
    randomise_adapters(adapted)
    expected = logits(adapted, ROWS[0])
    save_model(adapted, tokenizer, tmp_path / "m", policy_card("", "sft", tokenizer), settings={}, parents={})
    torch.testing.assert_close(logits(load_policy(tmp_path / "m"), ROWS[0]), expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1


@torch.no_grad()
def test_a_scalar_model_with_adapters_trains_its_head_and_is_saved_merged(
    policy_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    scalar = scalar_from_policy(policy_folder).eval()
    scalar.model = with_lora(scalar.model, Lora(rank=4), task_type="SEQ_CLS")
    randomise_adapters(scalar)
    heads = [p for name, p in scalar.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [tuple(head.shape) for head in heads] == [(1, 32)]
    nn.init.normal_(heads[0])
    expected = scalar.score(*pad(ROWS, 0))
    assert expected.std() > 0.01
    card = ModelCard("reward", "", "reward", "")
    save_model(scalar.model, tokenizer, tmp_path / "m", card, settings={}, parents={})
    torch.testing.assert_close(
        load_scalar(tmp_path / "m").score(*pad(ROWS, 0)), expected, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_learned_positions_count_from_the_first_real_token() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    scalar = ScalarModel(transformers.GPT2ForSequenceClassification(config)).eval()
    nn.init.normal_(scalar.model.transformer.wpe.weight)
    right, left = (scalar.score(*pad(ROWS, 0, side)) for side in ("right", "left"))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_a_model_without_a_linear_head_is_an_error() -> None:
    with pytest.raises(InputError, match="no linear head named 'score'"):
        ScalarModel(nn.Linear(2, 1))


def test_a_policy_is_not_taken_for_a_scalar_model(policy_folder: Path) -> None:
    with pytest.raises(InputError, match="says kind 'policy'; accepted: a reward or cost model"):
        load_scalar(policy_folder)


@torch.no_grad()
def test_a_new_scalar_model_prefers_nothing(policy_folder: Path) -> None:
    assert (scalar_from_policy(policy_folder).score(*pad(ROWS, 0)) == 0).all()


def tiny_with_dropout(family: str) -> Any:
    """A tiny model of a family that is configured with dropout."""
    import transformers

    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.LlamaConfig(vocab_size=64, attention_dropout=0.5, **sizes)
        return transformers.LlamaForCausalLM(config)
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
            )
        )
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        word_embed_proj_dim=16,
        dropout=0.5,
        attention_dropout=0.5,
    )
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_dropout_is_off_in_train_mode_too(family: str) -> None:
    model = tiny_with_dropout(family).train()
    assert not torch.equal(logits(model, ROWS[0]), logits(model, ROWS[0]))
    disable_dropout(model)
    in_training = logits(model, ROWS[0])
    assert torch.equal(in_training, logits(model, ROWS[0]))
    torch.testing.assert_close(in_training, logits(model.eval(), ROWS[0]))


def test_a_saved_folder_holds_safetensors_a_card_and_a_manifest_that_verifies(
    policy: Any, tokenizer: Any, policy_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    card = policy_card("base-digest", "sft", tokenizer)
    digest = save_model(
        policy, tokenizer, folder, card, settings={"seed": 1}, parents={"base": policy_folder}
    )
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "card.json", MANIFEST} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert verify_manifest(folder) == digest
    assert ModelCard.read(folder) == card
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["parents"] == {"base": verify_manifest(policy_folder)} and manifest["settings"] == {
        "seed": 1
    }
    assert save_model(policy, tokenizer, tmp_path / "again", card, settings={}, parents={}) == digest
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        verify_manifest(folder)


def test_weights_are_saved_in_float32_whatever_they_are_loaded_as(policy_folder: Path) -> None:
    assert load_policy(policy_folder).dtype == torch.float32
    assert load_policy(policy_folder, dtype="bf16").dtype == torch.bfloat16
    assert json.loads((policy_folder / "config.json").read_text())["dtype"] == "float32"


def test_folders_that_hold_no_model_are_errors_that_name_them(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text((policy_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle that must not be opened")
    with pytest.raises(InputError, match="Weights must be in safetensors"):
        load_policy(tmp_path)
    with pytest.raises(InputError, match=r"card.json: no such file"):
        ModelCard.read(tmp_path)


def test_scores_are_float32_under_bf16_arithmetic(reward_folder: Path) -> None:
    scalar = load_scalar(reward_folder)
    ids = torch.randint(5, 200, (64, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scalar.score(ids, torch.ones_like(ids, dtype=torch.bool))
    raw = scores * scalar.std + scalar.mean
    assert scores.dtype == torch.float32
    assert not torch.equal(raw, raw.bfloat16().float())  # not rounded to 8 bits on the way


def test_a_model_that_finds_no_room_is_one_message(policy_folder: Path, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    policy, tokenizer = load_policy(policy_folder), load_tokenizer(policy_folder)
    policy.save_pretrained = full
    with pytest.raises(InputError, match=r"m: the model cannot be written: .*No space left .* Make room there"):
        save_model(policy, tokenizer, tmp_path / "m", ModelCard.read(policy_folder), settings={}, parents={})


def test_a_reward_model_is_not_taken_for_a_policy(reward_folder: Path) -> None:
    with pytest.raises(InputError, match="saved without a language-model head"):
        load_policy(reward_folder)


def test_truncated_weights_are_one_message(policy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(policy_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_policy(folder)
