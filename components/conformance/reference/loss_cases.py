"""The inputs of the golden vectors on losses, with the inputs that each is derived by."""

from typing import Any

from components.conformance.reference.cases import MASK, Case
from components.conformance.reference.tensors import FINITE, NOT_FINITE, Mask, Rows, added, dirty, numbers, ragged, rows

NORMALIZATIONS = {
    "token": (None, "every token weighs the same"),
    "sequence": (None, "every response weighs the same"),
    "constant": (8, "every token weighs the same, whatever else is in the batch"),
}
CLIPPED = "Schulman et al. 2017, equation 7"


def update(seed: int, reach: float = 0.6) -> dict[str, Any]:
    """New and old log-probabilities, log-ratios up to `reach`, rubbish in the padding."""
    old = rows(seed, -4, -0.5)
    return {
        "logprobs": dirty(added(old, rows(seed + 1, -reach, reach)), MASK, FINITE[::-1]),
        "old_logprobs": dirty(old, MASK),
    }


def overwritten(values: Rows, row: int, start: list[float]) -> Rows:
    """The values with other numbers at the beginning of one row."""
    return [[*start, *line[len(start) :]] if at == row else line for at, line in enumerate(values)]


def policy_losses() -> list[Case]:
    """PPO's clipped loss."""
    advantages = dirty(rows(13, -2, 2), MASK)
    plain = {**update(11), "advantages": advantages, "mask": MASK, "clip": 0.2, "clip_high": None, "dual_clip": None}
    token = {"normalization": "token", "constant": None}
    far = {
        "logprobs": overwritten(plain["logprobs"], 2, [-1.0, -1.0, -26.5, -26.5]),
        "old_logprobs": overwritten(plain["old_logprobs"], 2, [-26.5, -26.5, -1.0, -1.0]),
        "advantages": overwritten(advantages, 2, [-1.5, 1.5, -1.5, 1.5]),
    }
    still = {"logprobs": dirty(rows(11, -4, -0.5), MASK), "old_logprobs": dirty(rows(11, -4, -0.5), MASK)}
    noisy = {name: dirty(plain[name], MASK, NOT_FINITE) for name in ("logprobs", "old_logprobs", "advantages")}
    variants: list[tuple[str, str, str, dict[str, Any]]] = [
        *((name, about, CLIPPED, {"normalization": name, "constant": constant})
          for name, (constant, about) in NORMALIZATIONS.items()),
        ("ratio-one", "before the first step the gradient is the plain policy gradient", CLIPPED, {**still, **token}),
        ("clip-higher", "a wider upper bound", "Yu et al. 2025 (DAPO)", {**token, "clip_high": 0.28}),
        ("dual-clip", "a floor under tokens of negative advantage", "Ye et al. 2020, dual-clip PPO",
         {**update(14, 2.5), **token, "dual_clip": 3.0}),
        ("clamped", "log-ratios of +-25.5 overflow nothing and teach nothing", CLIPPED, {**far, **token}),
        ("not-finite-padding", "neither value nor gradient hears of the padding", CLIPPED, {**noisy, **token}),
    ]  # fmt: skip
    return [
        Case(f"policy_loss/{name}", about, source, {**plain, **changed}, ("logprobs",))
        for name, about, source, changed in variants
    ]


def value_losses() -> list[Case]:
    """PPO's clipped value loss."""
    old = rows(16)
    plain = {"values": added(old, rows(17, -0.5, 0.5)), "old_values": old, "returns": rows(18, -2, 2)}
    return [
        Case(f"value_loss/{name}", about, "Huang et al. 2024, The N+ implementation details of RLHF with PPO",
             {**{key: dirty(value, MASK, *rubbish) for key, value in plain.items()}, "mask": MASK, "clip": 0.2},
             ("values",))
        for name, about, rubbish in (
            ("clipped", "the larger of two squared errors, half of it", ()),
            ("not-finite-padding", "neither value nor gradient hears of the padding", (NOT_FINITE,)),
        )
    ]  # fmt: skip


def group_losses() -> list[Case]:
    """RLOO's loss on whole responses, and GRPO's with the KL in it."""
    plain = {**update(19, 0.25), "advantages": [1.5, -0.75, 0.5, -2.0], "mask": MASK, "clip": 0.2}
    far = {
        "logprobs": dirty([[-2.0] * 6, [-9.0] * 6, [-2.0] * 6, [-2.0] * 6], MASK),
        "old_logprobs": dirty([[-24.5] * 6, [-2.0] * 6, [-7.0] * 6, [-11.0] * 6], MASK),
    }
    noisy = {name: dirty(plain[name], MASK, NOT_FINITE) for name in ("logprobs", "old_logprobs")}
    source = "Ahmadian et al. 2024 (RLOO), with the ratio of whole responses clipped as in PPO"
    found = [
        Case(f"sequence_policy_loss/{name}", about, source, {**plain, **changed}, ("logprobs",))
        for name, about, changed in (
            ("clipped", "one ratio per response", {}),
            ("clamped", "the summed log-ratio is held at +-20", far),
            ("not-finite-padding", "neither value nor gradient hears of the padding", noisy),
        )
    ]
    ref = rows(21, -4, -0.5)
    base = {**update(22), "ref_logprobs": dirty(ref, MASK), "advantages": plain["advantages"], "mask": MASK}
    base |= {"clip": 0.2, "kl_coef": 0.04, "normalization": "token", "constant": None}
    beyond = {"ref_logprobs": overwritten(base["ref_logprobs"], 1, [-30.0, -0.01]),
              "logprobs": overwritten(base["logprobs"], 1, [-1.5, -24.0]),
              "old_logprobs": overwritten(base["old_logprobs"], 1, [-1.4, -24.1])}  # fmt: skip
    noisy = {name: dirty(base[name], MASK, NOT_FINITE) for name in ("logprobs", "old_logprobs", "ref_logprobs")}
    variants: list[tuple[str, str, dict[str, Any]]] = [
        *((name, about, {"normalization": name, "constant": constant})
          for name, (constant, about) in NORMALIZATIONS.items()),
        ("without-kl", "the reference does not matter", {"kl_coef": 0.0}),
        ("clamped", "a reference that finds a token absurd, or the policy's own", beyond),
        ("not-finite-padding", "neither value nor gradient hears of the padding", noisy),
    ]  # fmt: skip
    return found + [
        Case(f"grpo_loss/{name}", about, "Shao et al. 2024, equations 3 and 4", {**base, **changed}, ("logprobs",))
        for name, about, changed in variants
    ]


def preference_losses() -> list[Case]:
    """DPO and IPO from the log-probabilities of tokens; reward and cost models from scores."""
    masks: tuple[Mask, Mask] = MASK, ragged((6, 1, 2, 5))
    arguments: dict[str, Any] = {
        "chosen_logprobs": dirty(rows(25, -3, -0.1), masks[0]),
        "rejected_logprobs": dirty(rows(26, -3, -0.1), masks[1]),
        "ref_chosen_logprobs": dirty(rows(27, -3, -0.1), masks[0]),
        "ref_rejected_logprobs": dirty(rows(28, -3, -0.1), masks[1]),
        "chosen_mask": masks[0],
        "rejected_mask": masks[1],
    }
    single = ragged((1, 1, 1, 1))
    tokens = {name: single if "mask" in name else dirty(value, single) for name, value in arguments.items()}
    noisy = {name: value if "mask" in name else dirty(value, masks["rejected" in name], NOT_FINITE)
             for name, value in arguments.items()}  # fmt: skip
    dpo, ipo = "Rafailov et al. 2023, equation 7", "Azar et al. 2023, equation 17"
    smoothed = "Mitchell 2023, A note on DPO with noisy preferences"
    variants: list[tuple[str, str, str, dict[str, Any], float, float]] = [
        ("sigmoid", "lengths differ; sums, not means, over tokens", dpo, arguments, 0.1, 0.0),
        ("sigmoid-steep", "the sigmoid far out on both sides", dpo, arguments, 20.0, 0.0),
        ("sigmoid-smoothed", "a tenth of the labels taken for wrong", smoothed, arguments, 0.5, 0.1),
        ("sigmoid-not-finite-padding", "neither value nor gradient hears of the padding", dpo, noisy, 0.1, 0.0),
        ("ipo", "a target margin of 1 / (2 beta)", ipo, arguments, 0.1, 0.0),
        ("ipo-single-tokens", "responses of one token", ipo, tokens, 0.3, 0.0),
    ]  # fmt: skip
    return [
        Case(f"preference_loss/{name}", about, source,
             {**inputs, "beta": beta, "kind": name.partition("-")[0], "label_smoothing": smoothing},
             ("chosen_logprobs", "rejected_logprobs"))
        for name, about, source, inputs, beta, smoothing in variants
    ]  # fmt: skip


def score_losses() -> list[Case]:
    """Losses of reward and cost models on pairs."""
    chosen, rejected = numbers(29, 6, -3, 3), numbers(30, 6, -3, 3)
    flags = {"chosen_sign": [-1.0, 0.0, -1.0, 1.0, 0.0, -1.0], "rejected_sign": [1.0, 1.0, -1.0, 1.0, 0.0, 0.0]}
    far = {"chosen": [600.0, -900.0], "rejected": [-700.0, 800.0]}
    order = "Bradley and Terry 1952; Ouyang et al. 2022, equation 1"
    signs = "Dai et al. 2023 (Safe RLHF), the cost model's loss"
    return [
        Case("ranking_loss/pairs", "chosen above rejected", order, {"chosen": chosen, "rejected": rejected},
             ("chosen", "rejected")),
        Case("ranking_loss/ties", "equal scores cost log 2", order, {"chosen": [1.25, 0.0], "rejected": [1.25, 0.0]},
             ("chosen", "rejected")),
        Case("ranking_loss/far", "no overflow at margins of 1300 and -1700", order, far, ("chosen", "rejected")),
        Case("cost_loss/flags", "safe, unsafe and unflagged responses", signs,
             {"chosen": chosen, "rejected": rejected, **flags}, ("chosen", "rejected")),
        Case("cost_loss/far", "no overflow, and both signs wrong once", signs,
             {**far, "chosen_sign": [-1.0, 1.0], "rejected_sign": [1.0, -1.0]}, ("chosen", "rejected")),
    ]  # fmt: skip

