"""The base step: a small model trained from text, or a given one made ready for the later steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components import training
from components.artifacts import ModelCard, read_manifest, verify_manifest
from components.base import architecture
from components.base.settings import BaseSettings
from components.base.step import run
from components.errors import InputError
from components.models import load_policy
from components.records import Message
from components.tokens import encode_prompt, load_tokenizer, template_digest
from components.tracking import Row

TEXT = "\n\n".join(
    f"{word} comes before {word} and after {word}." for word in ("red", "blue", "seven") for _ in range(12)
)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest size is smaller still."""
    monkeypatch.setitem(architecture.SIZES, "1m", (32, 2, 2, 1, 64))


@pytest.fixture
def settings(quick_training: Callable[..., Any]) -> Callable[..., BaseSettings]:
    def made(**fields: Any) -> BaseSettings:
        return BaseSettings(
            **({"vocab_size": 320, "test_share": 0.1, "training": quick_training(epochs=3)} | fields)
        )

    return made


def test_a_model_is_trained_from_the_data_s_own_text(
    settings: Any, data_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(), raw=None, data=data_folder, base=tmp_path / "base")
    assert metrics["eval/loss"] < 0.7 * 5.7  # ln 300: an even guess
    assert metrics["base/vocab_size"] <= 320
    tokenizer, model = load_tokenizer(tmp_path / "base"), load_policy(tmp_path / "base")
    assert model.num_parameters() == metrics["base/num_parameters"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    card = ModelCard.read(tmp_path / "base")
    assert (card.kind, card.step, card.template_digest) == ("policy", "base", template_digest(tokenizer))
    assert read_manifest(tmp_path / "base")["parents"] == {"data": read_manifest(data_folder)["digest"]}
    verify_manifest(tmp_path / "base")


def test_the_same_seed_makes_the_same_model(settings: Any, data_folder: Path, tmp_path: Path) -> None:
    quick = settings(training=settings().training.model_copy(update={"epochs": 1}))
    for name in ("one", "two"):
        run(quick, raw=None, data=data_folder, base=tmp_path / name)
    run(quick.model_copy(update={"seed": 1}), raw=None, data=data_folder, base=tmp_path / "other")
    digests = [verify_manifest(tmp_path / name) for name in ("one", "two", "other")]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_model_is_trained_from_a_file_beside_the_raw_data(
    ending: str, settings: Any, data_folder: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = TEXT.split("\n\n")
    text = TEXT if ending == ".txt" else "\n".join(json.dumps({"text": row}) for row in rows)
    (raw / f"text{ending}").write_text(text)
    metrics = run(settings(text=f"text{ending}"), raw=raw, data=data_folder, base=tmp_path / "base")
    assert metrics["eval/loss"] < 4
    assert list(read_manifest(tmp_path / "base")["parents"]) == ["text"]


def test_another_text_does_not_continue_from_the_checkpoint_of_the_last(
    settings: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    training_settings = settings().training.model_copy(update={"checkpoint_every": 1, "epochs": 1})
    made = settings(text=str(path), training=training_settings)

    def stop(metrics: dict[str, float], update: int) -> Row:
        if update == 2:
            raise KeyboardInterrupt
        return Row(update, 0.0, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(training.tracking, "log_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            run(made, raw=None, data=data_folder, base=tmp_path / "a" / "base")
    path.write_text(TEXT.replace("red", "green"))
    run(made, raw=None, data=data_folder, base=tmp_path / "a" / "base")
    run(made, raw=None, data=data_folder, base=tmp_path / "b" / "base")
    assert verify_manifest(tmp_path / "a" / "base") == verify_manifest(tmp_path / "b" / "base")


def test_a_given_model_is_copied_with_the_same_outputs(
    settings: Any, policy_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(model=str(policy_folder)), raw=None, data=data_folder, base=tmp_path / "base")
    ids = torch.tensor([[10, 11, 12]])
    with torch.no_grad():
        given, copied = (load_policy(folder)(ids).logits for folder in (policy_folder, tmp_path / "base"))
    assert torch.equal(given, copied)
    assert set(metrics) == {"base/num_parameters"}
    assert ModelCard.read(tmp_path / "base").base == str(policy_folder)


def test_a_given_model_that_pads_with_its_end_token_gets_a_pad_token_of_its_own(
    settings: Any, policy_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    load_policy(policy_folder).save_pretrained(given)
    tokenizer = load_tokenizer(policy_folder)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None
    tokenizer.save_pretrained(given)
    run(settings(model=str(given)), raw=None, data=data_folder, base=tmp_path / "base")
    adopted, model = load_tokenizer(tmp_path / "base"), load_policy(tmp_path / "base")
    assert adopted.pad_token_id != adopted.eos_token_id
    assert model.config.pad_token_id == adopted.pad_token_id
    assert model.get_input_embeddings().num_embeddings >= len(adopted)
    assert encode_prompt(adopted, (Message("user", "hi"),))


def test_a_model_that_is_nowhere_is_an_error_that_names_the_setting(
    settings: Any, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"base\.model is 'no such/model/here'.*a folder, a gs:// address"):
        run(settings(model="no such/model/here"), raw=None, data=data_folder, base=tmp_path / "base")


def test_a_folder_without_a_tokenizer_is_an_error(
    settings: Any, policy_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    load_policy(policy_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer"):
        run(settings(model=str(tmp_path / "bare")), raw=None, data=data_folder, base=tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"one"\n{"prompt": "x"}\n', "a.jsonl row 2: field 'response' is missing"),
        ("b.jsonl", '"one"\nnot json\n', "b.jsonl row 2: not JSON"),
        ("c.jsonl", '"one"\n{"body": "x"}\n', "c.jsonl row 2: no text"),
        ("d.txt", "only one document", "d.txt: 1 documents; a base model needs 2 or more"),
    ],
)
def test_text_that_does_not_fit_is_an_error_that_names_the_row(
    name: str, content: str, message: str, settings: Any, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        run(settings(text=str(tmp_path / name)), raw=None, data=data_folder, base=tmp_path / "base")
