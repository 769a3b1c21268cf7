"""Sampling: batches change nothing, the distribution is as stated, log-probabilities are the trainer's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.generation import Samples, respond
from components.generation.native import NativeSampler
from components.generation.picking import pick, truncate
from components.logprobs import response_logprobs
from components.models import end_ids, load_policy
from components.records import Message
from components.settings import Generation
from components.tokens import decode_response, encode_prompt, pad

PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]]
NEVER = 0  # the pad id: a filler that greedy and sampled responses of these tests do not hold


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> Any:
    return load_policy(policy_folder)


def sampled(
    policy: Any, prompts: list[list[int]], eos: int = NEVER, k: int = 1, seed: int = 0, **fields: Any
) -> Samples:
    generation = Generation(**({"max_new_tokens": 12} | fields))
    return NativeSampler(policy, eos, generation, seed).sample(prompts, k)


def rows(samples: Samples) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]


def test_a_prompt_alone_and_in_a_padded_batch_gets_the_same_greedy_response(policy: Any) -> None:
    together = rows(sampled(policy, PROMPTS, temperature=0))
    assert together == [rows(sampled(policy, [prompt], temperature=0))[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) == 3


def test_greedy_equals_hugging_face_greedy(policy: Any) -> None:
    for prompt, ours in zip(PROMPTS, rows(sampled(policy, PROMPTS, temperature=0)), strict=True):
        theirs = policy.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=NEVER,
            pad_token_id=NEVER,
        )
        assert theirs[0, len(prompt) :].tolist() == ours


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_the_trainer_recomputes(policy: Any, temperature: float) -> None:
    samples = sampled(policy, PROMPTS, k=4, temperature=temperature)
    prompt_ids, prompt_mask = pad([prompt for prompt in PROMPTS for _ in range(4)], NEVER, side="left")
    ids, mask = torch.cat([prompt_ids, samples.ids], 1), torch.cat([prompt_mask, samples.mask], 1)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(policy, ids, mask, samples.ids.shape[1], temperature)
    torch.testing.assert_close(logprobs[samples.mask], samples.logprobs[samples.mask], atol=2e-5, rtol=1e-5)
    assert (entropy[samples.mask] > 0).all()


def test_rows_that_end_leave_without_changing_the_others(policy: Any) -> None:
    endless = rows(sampled(policy, PROMPTS, k=8, seed=6))
    assert {len(row) for row in endless} == {12}
    eos = endless[5][4]
    samples = sampled(policy, PROMPTS, eos=eos, k=8, seed=6)
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in endless]
    assert rows(samples) == ended
    assert samples.ended.tolist() == [eos in row for row in endless]
    assert 1 <= int(samples.ended.sum()) < 24


def test_the_end_token_is_under_the_mask_and_nothing_after_it(policy: Any) -> None:
    greedy = rows(sampled(policy, PROMPTS, temperature=0))
    eos = greedy[1][2]
    samples = sampled(policy, PROMPTS[1:2], eos=eos, temperature=0)
    length = greedy[1].index(eos) + 1
    assert samples.ids[0, -1] == eos and samples.mask[0, -1]
    assert samples.ids.shape == (1, length)
    together = sampled(policy, PROMPTS, eos=eos, temperature=0)
    assert together.mask[1].sum() == length
    assert (together.logprobs[1, length:] == 0).all() and (together.ids[1, length:] == eos).all()


def test_responses_of_a_prompt_are_neighbours_and_depend_on_the_seed_alone(policy: Any) -> None:
    first, again, other = (rows(sampled(policy, PROMPTS, k=2, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 6
    greedy = rows(sampled(policy, PROMPTS, k=2, temperature=0))
    assert greedy[0] == greedy[1] and greedy[2] == greedy[3] != greedy[0]


def test_a_sampler_goes_on_with_new_draws_and_leaves_the_mode_as_it_was(policy: Any) -> None:
    sampler = NativeSampler(policy, NEVER, Generation(max_new_tokens=4), seed=0)
    policy.train()
    first, second = sampler.sample(PROMPTS), sampler.sample(PROMPTS)
    assert policy.training
    policy.eval()
    assert rows(first) != rows(second)
    assert not first.logprobs.requires_grad


def test_top_k_and_top_p_by_hand() -> None:
    logprobs = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()

    def kept(top_k: int, top_p: float) -> list[int]:
        return torch.isfinite(truncate(logprobs, top_k, top_p))[0].nonzero().flatten().tolist()

    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(1, 1.0) == [1]
    assert kept(3, 1.0) == [1, 2, 3]
    assert kept(0, 0.39) == [1]  # one token is always kept
    assert kept(0, 0.5) == [1, 2]  # 0.4 is too little, 0.7 is enough
    assert kept(0, 0.75) == [1, 2, 3]
    assert kept(2, 0.95) == [1, 2]


def test_logprobs_of_a_truncated_choice_are_of_the_truncated_distribution() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    _, logprob = pick(logits, torch.tensor([0.0]), Generation(top_k=2))
    assert logprob.exp().item() == pytest.approx(0.4 / 0.7)


def test_temperature_zero_takes_the_likeliest_token_with_certainty() -> None:
    token, logprob = pick(torch.tensor([[0.0, 3.0, 2.9]]), torch.tensor([0.999]), Generation(temperature=0))
    assert token.item() == 1 and logprob.item() == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.05, 0.4, 0.25, 0.2, 0.1]),
        ({"temperature": 0.5}, [p**2 / 0.275 for p in (0.05, 0.4, 0.25, 0.2, 0.1)]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
    ],
)
def test_picks_are_distributed_as_stated(fields: dict[str, Any], expected: list[float]) -> None:
    count = 20_000
    logits = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]).log().expand(count, 5)
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    token, logprob = pick(logits, draws, Generation(**fields))
    seen, wanted = token.bincount(minlength=5).double(), torch.tensor(expected).double() * count
    assert (seen[wanted == 0] == 0).all()
    used = wanted > 0
    chi_square = ((seen - wanted).square() / wanted)[used].sum().item()
    assert chi_square < 18.5  # the 99.9 % quantile with 4 degrees of freedom
    torch.testing.assert_close(
        logprob.exp().double(), torch.tensor(expected).double()[token], rtol=1e-5, atol=0
    )


def test_extreme_draws_never_pick_a_token_without_probability() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).expand(2, 4)
    almost_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    token, _ = pick(logits, torch.stack([torch.tensor(0.0), almost_one]), Generation())
    assert token.tolist() == [1, 2]


def test_responses_come_in_the_prompts_order_whatever_the_batch_size(policy: Any, tokenizer: Any) -> None:
    prompts = [
        (Message("user", text),)
        for text in ("say red and blue and green", "a", "say seven", "say three north")
    ]
    one, all_at_once = (
        respond(
            policy, tokenizer, prompts, Generation(temperature=0, max_new_tokens=8, batch_size=size), seed=0
        )
        for size in (1, 4)
    )
    assert one == all_at_once
    ids: Tensor = NativeSampler(
        policy, tokenizer.eos_token_id, Generation(temperature=0, max_new_tokens=8), 0
    ).sample([encode_prompt(tokenizer, prompts[2])])
    (expected,) = rows(ids)
    assert one[2].text == decode_response(tokenizer, expected)
    assert one[2].num_tokens == len(expected) and one[2].ended == (expected[-1] == tokenizer.eos_token_id)


def test_a_long_prompt_loses_its_oldest_tokens(policy: Any, tokenizer: Any) -> None:
    long, short = ((Message("user", text),) for text in ("word " * 30 + "red", "red"))
    settings = Generation(temperature=0, max_new_tokens=6, max_prompt_tokens=2)
    first, second = respond(policy, tokenizer, [long, short], settings, seed=0)
    assert first == second


def test_a_response_ends_at_every_token_the_generation_config_names(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    eos = model.config.eos_token_id
    start = NativeSampler(model, eos, Generation(max_new_tokens=6, temperature=0), 0).sample([[5, 6, 7]])
    turn_end = int(start.ids[0, 2])
    model.generation_config.eos_token_id = [eos, turn_end]
    assert end_ids(model, eos) == sorted({eos, turn_end})
    short = NativeSampler(model, eos, Generation(max_new_tokens=6, temperature=0), 0).sample([[5, 6, 7]])
    first = start.ids[0].tolist().index(turn_end)
    assert short.ids[0].tolist() == start.ids[0].tolist()[: first + 1]
    assert bool(short.ended[0])
