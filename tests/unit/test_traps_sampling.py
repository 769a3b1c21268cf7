"""Traps between the distribution that is sampled and the one that is trained: temperature, dropout, kernels, dtype."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from components.divergence import kl_estimate
from components.errors import InputError
from components.evaluate.measures import Measures
from components.evaluate.report import Report
from components.evaluate.settings import EvaluateSettings
from components.generation.native import NativeSampler
from components.generation.picking import truncate
from components.logprobs import response_logprobs
from components.models import autocast, load_policy
from components.rl.algorithm_settings import (
    BestOfKSettings,
    DPOSettings,
    GRPOSettings,
    OnlineDPOSettings,
    PPOLagSettings,
    PPOSettings,
    RLOOSettings,
)
from components.rl.algorithms import build
from components.rl.assembly import Folders, build_networks
from components.rl.functional import masked_sum
from components.rl.loop import ratio_gap
from components.rl.networks import Networks
from components.rl.rollout import rollout_metrics
from components.rl.settings import RLSettings
from components.rl.sources import build_source
from components.rl.step import refuse
from components.rl.types import Batch, Forward, Rollout, Source
from components.settings import Compute, Generation, Lora
from components.tokens import load_tokenizer, pad

SAMPLED = (
    PPOSettings(),
    PPOLagSettings(),
    RLOOSettings(),
    GRPOSettings(),
    OnlineDPOSettings(),
    BestOfKSettings(),
)
PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]]


class Run(NamedTuple):
    """The parts of a run before its first update."""

    networks: Networks
    source: Source
    algorithm: Any


@pytest.fixture
def run_of(data_folder: Path, policy_folder: Path, reward_folder: Path, cost_folder: Path) -> Callable[..., Run]:
    """Networks, source and algorithm of a tiny run, sampled at temperature 0.7."""

    def made(algorithm: Any, policy: Path = policy_folder, **fields: Any) -> Run:
        settings = RLSettings(
            **{
                "algorithm": algorithm,
                "prompts_per_rollout": 6,
                "micro_batch_size": 5,
                "epochs": 2,  # so that ratios are taken to what the batch holds
                "generation": Generation(max_new_tokens=5, max_prompt_tokens=24, temperature=0.7),
                "compute": Compute(dtype="fp32"),
                **fields,
            }
        )
        teachers = {"reward": reward_folder, "cost": cost_folder}
        reward, cost = (folder if name in settings.teachers else None for name, folder in teachers.items())
        networks = build_networks(settings, policy, reward, cost)
        made = build(settings.algorithm, lambda tensor: tensor, settings.generation.max_new_tokens)
        tokenizer = load_tokenizer(policy)
        source, _ = build_source(settings, made, networks, tokenizer, Folders(data_folder, policy, reward, cost))
        return Run(networks, source, made)

    return made


def first_forward(networks: Networks, batch: Batch) -> Forward:
    """What the first update sees: the networks in train mode."""
    networks.train()
    with torch.no_grad():
        forward: Forward = networks(batch.input_ids, batch.attention_mask, batch.mask.shape[1])
    return forward


@pytest.mark.parametrize("algorithm", SAMPLED, ids=lambda settings: settings.name)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "adapters"])
def test_every_algorithm_starts_at_ratio_one(run_of: Any, algorithm: Any, rank: int) -> None:
    run = run_of(algorithm, lora=Lora(rank=rank))
    batch = run.source.batch(0)
    assert len(batch) > 0 and batch.mask.sum() >= 10
    assert (batch.logprobs is None) == (run.algorithm.ratio is None)
    assert ratio_gap(batch, first_forward(run.networks, batch)) < 1e-4
    assert batch.metrics["rollout/kl_k3"] < 1e-5  # the reference is read at the policy's temperature


def test_dropout_or_another_temperature_would_show_in_the_first_ratio(run_of: Any) -> None:
    run = run_of(RLOOSettings())
    batch = run.source.batch(0)
    untempered = run.networks.train()(batch.input_ids, batch.attention_mask, batch.mask.shape[1], temperature=1.0)
    assert ratio_gap(batch, untempered) > 0.1
    for module in run.networks.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    assert ratio_gap(batch, first_forward(run.networks, batch)) > 0.1


def test_a_policy_of_a_family_with_dropout_is_loaded_without(policy_folder: Path, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)  # its dropout is 0.1
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ids, mask = torch.tensor(PROMPTS[0])[None], torch.ones(1, 7, dtype=torch.bool)

    def gap(model: Any) -> float:
        in_training = Networks(model).train()(ids, mask, 4).logprobs
        return float((in_training - Networks(model).eval()(ids, mask, 4).logprobs).abs().max())

    with torch.no_grad():
        assert gap(load_policy(tmp_path)) == 0
        assert gap(transformers.GPT2LMHeadModel.from_pretrained(tmp_path)) > 1e-3


def test_learned_positions_count_real_tokens_when_prompts_are_padded() -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
    nn.init.normal_(model.transformer.wpe.weight)
    nn.init.normal_(model.transformer.wte.weight)
    generation = Generation(max_new_tokens=6, temperature=0)

    def responses(prompts: list[list[int]]) -> list[list[int]]:
        return NativeSampler(model, 0, generation, 0).sample(prompts).ids.tolist()

    alone = [responses([prompt])[0] for prompt in PROMPTS]
    assert responses(PROMPTS) == alone
    ids, mask = pad(PROMPTS, 0, side="left")
    with torch.no_grad():
        by_place = model(input_ids=ids, attention_mask=mask.long(), position_ids=torch.arange(7).expand(3, 7)).logits
        wrong = by_place[:, -1].argmax(-1).tolist()
    assert wrong != [row[0] for row in alone]  # what positions that count padding would have said first


def recomputed(policy: Any, samples: Any, k: int) -> Tensor:
    """The trainer's log-probabilities (B, R) of what was sampled, at temperature 1."""
    prompt_ids, prompt_mask = pad([prompt for prompt in PROMPTS for _ in range(k)], 0, side="left")
    ids, mask = torch.cat([prompt_ids, samples.ids], 1), torch.cat([prompt_mask, samples.mask], 1)
    with torch.no_grad():
        return response_logprobs(policy, ids, mask, samples.ids.shape[1])[0]


@pytest.mark.parametrize(("dtype", "at_most"), [("fp32", 2e-5), ("bf16", 0.5)])
def test_the_sampler_and_the_trainer_agree_as_far_as_their_arithmetic_allows(
    policy_folder: Path, dtype: str, at_most: float
) -> None:
    policy = load_policy(policy_folder)
    with autocast(dtype):
        samples = NativeSampler(policy, 0, Generation(max_new_tokens=12), 0).sample(PROMPTS, 8)
        first, second = (recomputed(policy, samples, 8) for _ in range(2))
    gap = (first - samples.logprobs)[samples.mask].abs()
    assert gap.max() < at_most and gap.mean() < at_most / 10
    assert torch.equal(first, second)  # under the trainer the ratio is 1 exactly
    assert first.dtype == torch.float32


def test_truncated_sampling_is_another_distribution_and_is_refused(policy_folder: Path) -> None:
    policy = load_policy(policy_folder)
    samples = NativeSampler(policy, 0, Generation(max_new_tokens=6, top_p=0.5), 0).sample(PROMPTS, 8)
    gap = (samples.logprobs - recomputed(policy, samples, 8))[samples.mask]
    assert gap.mean() > 0.3  # ratios against the sampler's own numbers would start far from 1
    for generation in (Generation(top_p=0.5), Generation(top_k=3)):
        with pytest.raises(InputError, match=r"another distribution than the one that is trained"):
            refuse(RLSettings(algorithm=RLOOSettings(), generation=generation), policy_folder, None)


def test_under_truncated_sampling_k1_turns_negative_and_the_report_says_so(tmp_path: Path) -> None:
    policy, reference = torch.tensor([[0.45, 0.3, 0.25], [0.6, 0.2, 0.2]]).log()
    exact = float((policy.exp() * (policy - reference)).sum())
    sampled = truncate(policy[None], top_k=1, top_p=1.0)[0].softmax(-1)  # the likeliest token alone
    seen = float((sampled * kl_estimate(policy, reference, "k1")).sum())
    assert exact > 0 > seen
    for generation, noted in ((Generation(top_k=1), True), (Generation(temperature=0.0), True), (Generation(), False)):
        report = Report(EvaluateSettings(generation=generation), [], Measures({}, {}, {}), [], 0, [])
        assert any("whole distribution" in note for note in report._notes()) == noted


def test_a_negative_kl_is_shown_as_it_is() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    ids = torch.zeros(2, 4, dtype=torch.long)
    logprobs, ref_logprobs = torch.full((2, 2), -2.0), torch.full((2, 2), -1.0)
    ended = torch.tensor([True, True])
    attention_mask = torch.ones(2, 4, dtype=torch.bool)
    metrics = rollout_metrics(Rollout(ids, attention_mask, mask, logprobs, ref_logprobs, torch.zeros(2), ended))
    assert metrics["rollout/kl_k1"] == -2.0  # two tokens of log-ratio -1
    assert metrics["rollout/kl_k3"] > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_labelled_pairs_are_compared_at_one_temperature(run_of: Any, temperature: float) -> None:
    generation = Generation(max_new_tokens=5, max_prompt_tokens=24, temperature=temperature)
    run = run_of(DPOSettings(), generation=generation)
    batch = run.source.batch(0)
    _, means = run.algorithm.loss(batch, first_forward(run.networks, batch))
    assert means["policy/margin"][0] == pytest.approx(0, abs=1e-4)
    assert means["loss/policy"][0] / means["loss/policy"][1] == pytest.approx(0.6931, abs=1e-3)
    tempered = copy.copy(run.networks)
    tempered.temperature = 0.5  # the policy at 0.5 against a reference at 1
    _, wrong = run.algorithm.loss(batch, first_forward(tempered, batch))
    assert abs(wrong["policy/margin"][0]) > 0.1


def test_softmax_entropy_and_sums_are_float32_in_a_bf16_policy(policy_folder: Path) -> None:
    policy = load_policy(policy_folder, "bf16")
    ids, mask = torch.tensor(PROMPTS[0])[None], torch.ones(1, 7, dtype=torch.bool)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(policy, ids, mask, 4)
        logits = policy(ids).logits[:, -5:-1]
    assert logits.dtype == torch.bfloat16
    exact = logits.double().log_softmax(-1)
    taken = exact.gather(-1, ids[:, -4:, None]).squeeze(-1)
    assert (logprobs - taken).abs().max() < 1e-5
    assert (entropy + (exact.exp() * exact).sum(-1)).abs().max() < 1e-5
    assert (logits.log_softmax(-1).double() - exact).abs().max() > 1e-2  # what bf16 would have made of them
    long = torch.full((1, 4000), -1.01)
    everywhere = torch.ones_like(long, dtype=torch.bool)
    assert masked_sum(long, everywhere).item() == pytest.approx(-4040, abs=0.1)
    assert abs(long.bfloat16().sum().item() + 4040) > 1


def test_draws_come_from_the_sampler_s_own_generator(policy_folder: Path) -> None:
    policy = load_policy(policy_folder)

    def sample(seed: int, elsewhere: int) -> Tensor:
        torch.manual_seed(elsewhere)
        return NativeSampler(policy, 0, Generation(max_new_tokens=4), seed).sample(PROMPTS, 4).ids

    assert torch.equal(sample(0, 1), sample(0, 2))
    assert not torch.equal(sample(0, 1), sample(1, 1))
    one_prompt = sample(0, 0)[:4]
    assert len({tuple(row) for row in one_prompt.tolist()}) == 4  # the rows of a group have draws of their own
