"""What can go wrong in reinforcement learning, each as a detector with its likely causes and the next move."""

from collections.abc import Callable

from components.artifacts import Metrics
from components.monitoring import Detector, Monitor
from components.rl.algorithm_settings import AlgorithmSettings, OnlineSettings, PPOLagSettings
from components.rl.settings import AlertSettings

RATIO_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""How far from 1 rounding alone takes a ratio at the first update of a batch: of the order of the dtype's epsilon
times the size of a log-probability, with room for other orders of summation."""
SATURATED, DEAD = 0.99, 0.01
"""Lambda is at its bound from this share of it, and without effect below this value."""
KL_NOISE = 0.05
"""Nats per response. A true KL of size K, estimated by k1 on B responses, has the deviation sqrt(2 K / B) around K:
the chance of less than -KL_NOISE is largest at K = KL_NOISE, where it is that of a normal deviate below
-sqrt(2 KL_NOISE B), 18 % for 8 responses and 0.02 % five times in a row."""


def rl_monitor(settings: AlertSettings, dtype: str, algorithm: AlgorithmSettings, staleness: int = 0) -> Monitor:
    """The monitor of an rl run that computes in `dtype` (fp32 or bf16), for what its algorithm can get wrong.

    With a `staleness` of more than 0 responses come from older weights, as they are meant to.
    """
    detectors = [ratio_mismatch(dtype), skipped_updates(), *_policy_detectors(settings)]
    detectors += [too_stale(settings, staleness)] if staleness else [sampler_mismatch(settings), negative_kl(settings)]
    if isinstance(algorithm, OnlineSettings):
        detectors.append(clamped_scores(algorithm.score_clip, settings.patience))
    if isinstance(algorithm, PPOLagSettings):
        detectors += [
            lambda_saturated(algorithm.lambda_max, settings.patience),
            constraint_violated(settings.patience),
        ]
        if algorithm.multiplier == "log":  # the other kind comes back from 0 as fast as it went there
            detectors.append(lambda_dead(settings.patience))
    return Monitor(detectors)


def ratio_mismatch(dtype: str) -> Detector:
    """The policy that is trained is not the one that sampled (`dtype`: fp32 or bf16)."""
    tolerance = RATIO_TOLERANCE[dtype]
    return Detector(
        "ratio_mismatch",
        ("policy/first_ratio_gap",),
        lambda now, _: not now["policy/first_ratio_gap"] <= tolerance,  # NaN is a mismatch too
        "The first update of a fresh batch has a ratio {policy/first_ratio_gap:.3g} away from 1; "
        f"{dtype} explains {tolerance:g}. Likely causes: dropout or another difference of train and eval mode, padding "
        "or position ids, adapters merged or disabled on one side, different temperatures in sampling and training, "
        "weights changed since sampling. Stop the run: its clipping and its gradients are wrong until the two agree.",
    )


def skipped_updates() -> Detector:
    """An update was skipped because its gradient was not finite."""
    name = "loss/skipped_updates"
    return Detector(
        "skipped_updates",
        (name,),
        lambda now, before: now[name] > before.get(name, 0.0),
        "Updates were skipped, {loss/skipped_updates:.4g} so far: their gradients were not finite. Likely causes: a "
        "learning rate that is too high, ratios that overflow, scores or costs that are not finite. Lower "
        "rl.optimizer.lr, lengthen its warm-up, or compute in fp32 to see whether it is the dtype.",
    )


def _policy_detectors(settings: AlertSettings) -> list[Detector]:
    """What the responses say of the policy: KL, ends and entropy."""

    def lasting(name: str, metric: str, wrong: Callable[[float], bool], message: str) -> Detector:
        def condition(now: Metrics, _: Metrics) -> bool:
            return wrong(now[metric])

        return Detector(name, (metric,), condition, message, settings.patience)

    return [
        lasting(
            "kl_runaway",
            "rollout/kl_k3",
            lambda kl: not kl <= settings.max_kl,
            "The KL to the reference (k3) is {rollout/kl_k3:.3g} nats per response, above rl.alerts.max_kl "
            f"{settings.max_kl:g}: scores of such responses are extrapolation. Likely causes: a learning rate that is "
            "too high, or a KL weight that is too low. Lower rl.optimizer.lr or raise the KL weight of rl.algorithm, "
            "and read samples.",
        ),
        lasting(
            "missing_eos",
            "rollout/missing_eos",
            lambda share: share > settings.max_missing_eos,
            "{rollout/missing_eos:.0%} of the responses did not end, above rl.alerts.max_missing_eos "
            f"{settings.max_missing_eos:.0%}: their scores are those of cut text. Likely causes: "
            "rl.generation.max_new_tokens is too small, the SFT policy never learned to end, or length is rewarded. "
            "Raise the limit or set rl.algorithm.missing_eos to penalty.",
        ),
        lasting(
            "entropy_collapse",
            "policy/entropy",
            lambda entropy: entropy < settings.min_entropy,
            "The policy's entropy is {policy/entropy:.3g} nats per token, below rl.alerts.min_entropy "
            f"{settings.min_entropy:g}: it hardly tries anything any more. Likely causes: a learning rate that is too "
            "high, a KL weight that is too low, or a score that a single response maximises. Read samples, then lower "
            "rl.optimizer.lr or raise the KL weight.",
        ),
    ]


def sampler_mismatch(settings: AlertSettings) -> Detector:
    """What samples has other log-probabilities than what is trained."""
    return Detector(
        "sampler_mismatch",
        ("sampler/logprob_gap",),
        lambda now, _: not now["sampler/logprob_gap"] <= settings.max_logprob_gap,  # NaN is a mismatch too
        "The log-probabilities of sampler and trainer are {sampler/logprob_gap:.3g} nats per token apart, at most "
        "{sampler/logprob_gap_max:.3g}, above rl.alerts.max_logprob_gap "
        f"{settings.max_logprob_gap:g}: responses come from another policy than the one that is trained. Likely "
        "causes: a server with another model, other weights or another temperature, quantised or computing in "
        "another dtype. Importance weights cannot make up for that: stop the run and compare the two.",
    )


def too_stale(settings: AlertSettings, staleness: int) -> Detector:
    """The policy moves further than importance weights make up for while responses wait to be learned from."""
    return Detector(
        "too_stale",
        ("sampler/logprob_gap",),
        lambda now, _: not now["sampler/logprob_gap"] <= settings.max_logprob_gap,
        "The policy is {sampler/logprob_gap:.3g} nats per token away from the weights that the responses were sampled "
        "with, at most {sampler/logprob_gap_max:.3g}, above rl.alerts.max_logprob_gap "
        f"{settings.max_logprob_gap:g}: it moves too far in {staleness} batches. Lower rl.optimizer.lr or "
        "rl.overlap.staleness; with a server that samples, see first that it computes what the trainer does.",
        settings.patience,
    )


def negative_kl(settings: AlertSettings) -> Detector:
    """The KL is estimated from other responses than the policy's own."""
    return Detector(
        "negative_kl",
        ("rollout/kl_k1",),
        lambda now, _: now["rollout/kl_k1"] < -KL_NOISE,
        "The KL to the reference (k1) is {rollout/kl_k1:.3g} nats per response and stays negative, which a KL "
        "never is: responses come from another distribution than the one that is trained. Likely causes: top-p, "
        "top-k or a temperature on one side only, suppressed end tokens, padding. Compare rl.generation with its "
        "defaults.",
        settings.patience,
    )


def clamped_scores(clip: float, patience: int) -> Detector:
    """Scores have drifted to where they are clamped, which hides the drift from the updates."""
    return Detector(
        "clamped_scores",
        ("rollout/score", "rollout/score_std"),
        lambda now, _: abs(now["rollout/score"]) + now["rollout/score_std"] > clip,
        "Scores are {rollout/score:.3g} with a deviation of {rollout/score_std:.3g}: many are clamped at "
        f"rl.algorithm.score_clip {clip:g}, where one response is as good as another. Likely causes: a scorer that is "
        "not normalised, or a policy that has found its mistakes. Read samples; raise score_clip only if the scores "
        "mean what they say.",
        patience,
    )


def lambda_saturated(lambda_max: float, patience: int) -> Detector:
    """The multiplier is at its bound and the limit is still not met."""
    return Detector(
        "lambda_saturated",
        ("cost/lambda", "cost/window_mean", "cost/limit"),
        lambda now, _: now["cost/lambda"] >= SATURATED * lambda_max and now["cost/window_mean"] > now["cost/limit"],
        f"Lambda is at its bound, rl.algorithm.lambda_max {lambda_max:g}, and "
        "J_C {cost/window_mean:.3g} is still above the limit {cost/limit:.3g}. Likely causes: a limit that no policy "
        "near the reference can meet, a cost model that reacts to the prompt and not to the response, or a KL weight "
        "that holds the policy back. Look at the costs of safe responses, then raise cost_limit or lambda_max.",
        patience,
    )


def lambda_dead(patience: int) -> Detector:
    """The multiplier is so small that costs have no effect, and it can hardly grow."""
    return Detector(
        "lambda_dead",
        ("cost/lambda",),
        lambda now, _: now["cost/lambda"] < DEAD,
        "Lambda is {cost/lambda:.3g}: costs have no effect on the policy, and if they rise it recovers slowly, because "
        "in log form its step is scaled by lambda itself. Likely causes: a limit that is met with ease, or a "
        "lambda_lr that is too high for this size of costs. Lower rl.algorithm.cost_limit or lambda_lr, or set "
        "rl.algorithm.multiplier to pid.",
        patience,
    )


def constraint_violated(patience: int) -> Detector:
    """The mean cost is surely above its limit."""
    return Detector(
        "constraint_violated",
        ("cost/window_low", "cost/window_mean", "cost/limit"),
        lambda now, _: now["cost/window_low"] > now["cost/limit"],
        "J_C {cost/window_mean:.3g} is above the limit {cost/limit:.3g} with all of its confidence band (from "
        "{cost/window_low:.3g}). Expected while lambda still climbs; otherwise the likely causes are a lambda that "
        "moves too slowly, a lambda at its bound, or reward and cost that pull apart. Watch lambda: if it is flat, "
        "raise rl.algorithm.lambda_lr (with pid, its gains) or lambda_max; do not ship this policy.",
        patience,
    )
