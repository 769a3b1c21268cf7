"""Rows as sequences: shared prompts and padding change no number of any row."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from components import attention, packed
from components.logprobs import token_logprobs
from components.models import load_policy, load_scalar
from components.packed import SHARING, Row, pack, rows_of, token_pairs, whole_rows

LONG = list(range(10, 40))
GROUPS = [
    Row(LONG, [40, 41, 42]),
    Row([7, 8], [43]),
    Row(LONG, [44]),
    Row(LONG, [45, 46, 47, 48, 49]),
    Row([7, 8], [50, 51]),
]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


def tiny(kind: str, **fields: Any) -> Any:
    """A random causal language model whose context and positions matter."""
    sizes = dict(SIZES)
    if kind != "gpt2":
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8}
    config = type(transformers.AutoConfig.for_model(kind))(**(sizes | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def results(model: Any, rows: list[Row]) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities and the gradients of a weighted sum of them."""
    found = token_logprobs(model, pack(model, rows), 1.0)[0].logprobs
    weights = torch.linspace(-1, 2, len(found))
    return found, [p.grad for p in _backward(model, (found * weights).sum())]


def _backward(model: Any, loss: Tensor) -> list[Any]:
    model.zero_grad()
    loss.backward()
    return [p for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [*SHARING, *(f"{kind} by mask" for kind in attention.KINDS)])
def test_rows_that_share_a_prompt_are_as_they_are_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _, by_mask = kind.partition(" ")
    model = tiny(kind)
    if by_mask:
        monkeypatch.setattr(attention, "SCORES", 0)
    rows = pack(model, GROUPS)
    assert len(rows.input_ids) == 2  # sequences: one a prompt
    assert (rows.shared is not None) == (kind in attention.KINDS and not by_mask)
    shared, gradients = results(model, GROUPS)
    gradients = [gradient.clone() for gradient in gradients]
    monkeypatch.setattr(packed, "SHARING", ())
    assert len(pack(model, GROUPS).input_ids) == 5
    alone, expected = results(model, GROUPS)
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=1e-4)
    assert shared.std() > 0.1
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_response_does_not_see_its_neighbours() -> None:
    model = tiny("llama")
    other = [GROUPS[0], Row(LONG, [60, 61]), *GROUPS[3:]]
    before, after = (
        token_logprobs(model, pack(model, rows), 1.0)[0].logprobs for rows in ([*GROUPS[:1], *GROUPS[2:]], other)
    )
    torch.testing.assert_close(before[:3], after[:3])
    torch.testing.assert_close(before[4:9], after[5:10])


def test_the_layout_by_hand() -> None:
    model = tiny("llama")
    rows = [Row([5, 6, 7, 8] * 20, [21, 22]), Row([5, 6, 7, 8] * 20, [23])]
    made = pack(model, rows)
    assert made.input_ids.tolist() == [[5, 6, 7, 8] * 20 + [21, 22, 23]]
    assert made.position_ids is not None and made.position_ids[0, -4:].tolist() == [79, 80, 81, 80]
    assert made.attention_mask is not None and made.attention_mask.shape == (1, 1, 83, 83)
    assert made.attention_mask[0, 0, 82].nonzero().flatten().tolist() == [*range(80), 82]
    assert made.attention_mask[0, 0, 81].nonzero().flatten().tolist() == list(range(82))
    assert (made.ends.tolist(), made.before.tolist(), made.taken.tolist()) == ([81, 82], [79, 80, 79], [21, 22, 23])


def test_rows_alone_need_no_mask_and_are_padded_right() -> None:
    made = pack(tiny("llama"), [Row([5, 6], [7]), Row([8], [9, 10, 11])])
    assert made.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert made.attention_mask is None and made.position_ids is None
    assert (made.ends.tolist(), made.before.tolist(), made.taken.tolist()) == ([2, 7], [1, 4, 5, 6], [7, 9, 10, 11])


def test_prompts_are_shared_where_that_is_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")  # a token is worth 4 * 16 = 64 pairs
    assert token_pairs(model, 100) == 64
    # alone 2 * (20 + 1) * (64 + 21) = 3570, shared 22 * (64 + 22) = 1892
    assert len(pack(model, [Row(LONG[:20], [1]), Row(LONG[:20], [2])]).input_ids) == 1
    # alone 2 * 41 * (64 + 41) = 8610, shared 81 * 64 + 1 + 2 * 40 * 41 = 8465
    rows = [Row([5], LONG + LONG[:10]), Row([5], LONG + LONG[10:20])]
    assert len(pack(model, rows).input_ids) == 1
    monkeypatch.setattr(attention, "SCORES", 0)
    # by mask 81 * (64 + 81) = 11745
    assert len(pack(model, rows).input_ids) == 2


def test_attention_that_takes_no_mask_of_ours_reads_rows_alone() -> None:
    rows = [Row(LONG, [1]), Row(LONG, [2])]
    slides, reaches = tiny("mistral", sliding_window=16), tiny("mistral", sliding_window=64)
    assert [len(pack(model, rows).input_ids) for model in (slides, reaches)] == [2, 1]
    eager = tiny("llama", attn_implementation="eager")
    assert len(pack(eager, rows).input_ids) == 2
    unknown = tiny("llama")
    unknown.config.model_type = "unheard-of"
    assert len(pack(unknown, rows).input_ids) == 2


def test_a_sliding_window_is_kept() -> None:
    model = tiny("mistral", sliding_window=4)
    rows = [Row(LONG, [1, 2]), Row(LONG, [3])]
    found = token_logprobs(model, pack(model, rows), 1.0)[0].logprobs
    expected = torch.log_softmax(model(torch.tensor([[*LONG, 1, 2]])).logits[0], -1)[[29, 30], [1, 2]]
    torch.testing.assert_close(found[:2], expected, atol=1e-4, rtol=1e-4)


def test_padded_rows_are_read_by_their_mask() -> None:
    ids = torch.tensor([[0, 5, 6, 7, 0], [8, 9, 0, 10, 11]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert rows_of(ids, mask, 2) == [Row([5, 6], [7]), Row([8, 9, 0], [10, 11])]
    assert whole_rows(ids, mask) == [Row([5, 6, 7], ()), Row([8, 9, 0, 10, 11], ())]


@torch.no_grad()
def test_scores_of_one_prompt_share_it(reward_folder: Path) -> None:
    scalar = load_scalar(reward_folder)
    made = pack(scalar.model, GROUPS)
    assert len(made.input_ids) == 2
    alone = [scalar(one, one.ends)[0] for one in (pack(scalar.model, [row]) for row in GROUPS)]
    torch.testing.assert_close(scalar(made, made.ends), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_prompt_without_tokens_is_a_mistake(policy_folder: Path) -> None:
    with pytest.raises(AssertionError, match="predicted from the prompt"):
        pack(load_policy(policy_folder), [Row([], [5])])
