"""A reward model whose tokenizer and template are not the policy's: texts are decoded and encoded anew."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn

from components.artifacts import ModelCard
from components.base import architecture
from components.generation import Response, Samples, decode
from components.models import load_scalar, policy_card, save_model, scalar_from_policy
from components.packed import Packed
from components.records import Message
from components.scoring import ModelScorer, load_scorer
from components.tokens import encode_prompt, encode_response, load_tokenizer, pad, template_digest

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]: {{ message.content }}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]: {% endif %}"
)
PROMPTS = [
    (Message("user", "say red"),),
    (
        Message("system", "be kind"),
        Message("user", "grüße 🙂👩‍👩‍👧"),
        Message("assistant", "hallo"),
        Message("user", "und?"),
    ),
    (Message("user", "日本語で <|end|> please"),),
]
TEXTS = ["yes, red", "no 🙂 never, 👩‍👩‍👧!", "", " 日本 leads with a space\n", "literally </s> and <s> and <|end|>"]


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a tokenizer of its own: other merges, names of special tokens, template, and a BOS."""
    torch.manual_seed(11)
    tokenizer = architecture.train_tokenizer(["the quick brown fox jumps over the lazy dog, quickly!"] * 3, 290)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    framing = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=framing)
    tokenizer.chat_template = TEMPLATE
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architecture.SIZES, "1m", (32, 2, 2, 1, 64))
        model = architecture.untrained_llama("1m", tokenizer, max_positions=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5.0 if parameter.ndim > 1 else 1.0
    folder = tmp_path_factory.mktemp("foreign")
    save_model(model, tokenizer, folder / "policy", policy_card("", "base", tokenizer), settings={}, parents={})
    scalar = scalar_from_policy(folder / "policy")
    nn.init.normal_(scalar.model.score.weight, std=0.3)
    card = ModelCard("reward", "", "reward", template_digest(tokenizer), 0.5, 2.0)
    save_model(scalar.model, tokenizer, folder / "reward", card, settings={}, parents={})
    return folder / "reward"


class Reader:
    """A scorer whose model remembers the ids it was shown."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scorer: ModelScorer = load_scorer(folder)
        self.rows: list[list[int]] = []
        forward = self.scorer.model.forward

        def watched(packed: Packed, places: Tensor) -> Tensor:
            ends = zip(packed.input_ids, packed.ends.tolist(), strict=True)  # rows that share no prompt
            self.rows += [ids[: end % len(ids) + 1].tolist() for ids, end in ends]
            return forward(packed, places)

        monkeypatch.setattr(self.scorer.model, "forward", watched)

    def text(self) -> str:
        """The ids of the one row that was scored, special tokens spelt out."""
        (row,) = self.rows
        return str(self.scorer.tokenizer.decode(row, clean_up_tokenization_spaces=False))


@pytest.fixture
def reader(foreign_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(foreign_folder, monkeypatch)


def sampled(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[Response]:
    """Responses as a policy with this tokenizer samples them."""
    ids, mask = pad(rows, tokenizer.pad_token_id)
    ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in rows])
    return decode(tokenizer, Samples(ids, mask, torch.zeros(ids.shape), ended))


def test_the_two_tokenizers_have_hardly_a_token_in_common(tokenizer: Any, foreign_folder: Path) -> None:
    foreign = load_tokenizer(foreign_folder)
    assert encode_response(tokenizer, TEXTS[0]) != encode_response(foreign, TEXTS[0])
    assert tokenizer.eos_token_id != foreign.eos_token_id
    assert foreign("a")["input_ids"][0] == foreign.bos_token_id  # it would add special tokens of its own accord


@pytest.mark.parametrize("prompt", PROMPTS[:2])
@pytest.mark.parametrize("text", TEXTS[:3])
def test_the_model_reads_the_ids_of_its_own_template(prompt: Any, text: str, reader: Reader, tokenizer: Any) -> None:
    (response,) = sampled(tokenizer, [encode_response(tokenizer, text)])
    reader.scorer.score([prompt], [response])
    dialogue = [asdict(message) for message in (*prompt, Message("assistant", text))]
    own = reader.scorer.tokenizer
    rendered = own.apply_chat_template(dialogue, tokenize=False).removesuffix("\n")
    assert reader.text() == rendered
    # The response is tokenised on its own, so no merge crosses the border between prompt and response.
    plain = own(text, add_special_tokens=False)["input_ids"]
    assert reader.rows == [[*encode_prompt(own, prompt), *plain, own.eos_token_id]]
    assert reader.rows[0].count(own.bos_token_id) == 1
    assert reader.rows[0].count(own.eos_token_id) == 1 + sum(message.role == "assistant" for message in prompt)


@pytest.mark.parametrize("text", TEXTS)
def test_sampled_tokens_score_as_their_text_does(text: str, tokenizer: Any, foreign_folder: Path) -> None:
    scorer, scalar, own = load_scorer(foreign_folder), load_scalar(foreign_folder), load_tokenizer(foreign_folder)
    responses = sampled(tokenizer, [encode_response(tokenizer, text)] * len(PROMPTS))
    assert {response.text for response in responses} == {text}
    scores = scorer.score(PROMPTS, responses)
    for score, prompt in zip(scores, PROMPTS, strict=True):
        ids = torch.tensor([encode_prompt(own, prompt) + encode_response(own, text)])
        with torch.no_grad():
            assert score.item() == pytest.approx(scalar.score(ids, torch.ones_like(ids).bool()).item(), abs=1e-4)


@pytest.mark.parametrize("ended", [True, False])
def test_the_models_own_end_token_stands_for_the_policys(ended: bool, reader: Reader, tokenizer: Any) -> None:
    (response,) = sampled(tokenizer, [encode_response(tokenizer, "yes", ended)])
    assert response.ended == ended
    reader.scorer.score(PROMPTS[:1], [response])
    assert reader.text() == "<s>[user]: say red\n[assistant]: yes" + ("</s>" if ended else "")


def test_the_policys_special_tokens_never_reach_the_model(reader: Reader, tokenizer: Any) -> None:
    user, pad_id = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.pad_token_id
    said = encode_response(tokenizer, "yes", ended=False)
    (response,) = sampled(tokenizer, [[user, *said, pad_id, user, tokenizer.eos_token_id]])
    reader.scorer.score(PROMPTS[:1], [response])
    assert reader.text() == "<s>[user]: say red\n[assistant]: yes</s>"


def test_a_response_that_spells_the_models_special_tokens_has_none_of_them(reader: Reader, tokenizer: Any) -> None:
    (response,) = sampled(tokenizer, [encode_response(tokenizer, TEXTS[-1])])
    reader.scorer.score(PROMPTS[:1], [response])
    own = reader.scorer.tokenizer
    assert reader.rows[0].count(own.eos_token_id) == 1 and reader.rows[0][-1] == own.eos_token_id
    assert reader.rows[0].count(own.bos_token_id) == 1
    assert reader.text().endswith(f"{TEXTS[-1]}</s>")


def test_a_character_cut_in_the_middle_is_scored_as_the_text_that_is_left(reader: Reader, tokenizer: Any) -> None:
    cut = encode_response(tokenizer, "so 🙂", ended=False)[:-1]
    (response,) = sampled(tokenizer, [cut])
    assert response.text.startswith("so ") and "�" in response.text and not response.ended
    (score,) = reader.scorer.score(PROMPTS[:1], [response])
    assert reader.text() == f"<s>[user]: say red\n[assistant]: {response.text}"
    assert torch.isfinite(score)
