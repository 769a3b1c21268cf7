"""The making of drafts by several processes: each samples, scores and reads its share, and all get the whole.

Random numbers are drawn for all rows by every process, so that a response is the same whoever samples it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from components.artifacts import Metrics
from components.gathering import whole
from components.generation import Response, Samples
from components.generation.native import NativeSampler
from components.models import device
from components.ranks import Ranks
from components.records import Conversation
from components.rl.drafts import Models
from components.rl.networks import in_order
from components.rl.reference import Reference
from components.scoring import EnsembleScorer, ModelScorer, Scorer


def shared(models: Models, policy: nn.Module, ranks: Ranks) -> Models:
    """The models as all processes use them together; themselves where there is one process."""
    if ranks.size == 1:
        return models
    sampler = models.sampler
    return replace(
        models,
        sampler=SharedSampler(sampler, policy, ranks) if isinstance(sampler, NativeSampler) else sampler,
        reference=SharedReference(models.reference, ranks),
        reward=_shared_scorer(models.reward, ranks),
        cost=None if models.cost is None else _shared_scorer(models.cost, ranks),
    )


def _shared_scorer(scorer: Scorer, ranks: Ranks) -> Scorer:
    """The scorer for all rows of all processes; models share their batches out themselves."""
    return scorer if isinstance(scorer, ModelScorer | EnsembleScorer) else SharedScorer(scorer, ranks)


def own_rows(rows: int, ranks: Ranks) -> slice:
    """The rows of this process: as many as of any other, or one more; rows of neighbours are neighbours."""
    return slice(rows * ranks.rank // ranks.size, rows * (ranks.rank + 1) // ranks.size)


class SharedSampler:
    """Our decoder in every process, each with its prompts."""

    def __init__(self, sampler: NativeSampler, policy: nn.Module, ranks: Ranks) -> None:
        self.sampler, self.policy, self.ranks = sampler, policy, ranks
        self.on_policy, self.metrics = sampler.on_policy, sampler.metrics

    def sample(self, prompts: Sequence[Sequence[int]], k: int = 1) -> Samples:
        """`k` responses to each prompt, the same as one process samples."""
        own = own_rows(len(prompts), self.ranks)
        samples = None
        with whole(self.policy):
            self.sampler.draw(own.start * k)
            if prompts[own]:
                samples = self.sampler.sample(prompts[own], k)
            self.sampler.draw((len(prompts) - own.stop) * k)
        return _joined([found for found in self.ranks.gathered(samples) if found is not None])

    def state(self) -> Tensor:
        """The state of the random generator, the same in every process."""
        return self.sampler.state()

    def restore(self, state: Tensor) -> None:
        """Take back what `state` gave."""
        self.sampler.restore(state)


class SharedScorer:
    """A scorer in every process, each with its rows."""

    def __init__(self, scorer: Scorer, ranks: Ranks) -> None:
        self.scorer, self.ranks = scorer, ranks
        self.metrics: Metrics = {}

    def score(self, prompts: Sequence[Conversation], responses: Sequence[Response]) -> Tensor:
        """Scores (B,); their metrics are means over all rows."""
        own = own_rows(len(prompts), self.ranks)
        rows = own.stop - own.start
        scores = self.scorer.score(prompts[own], responses[own]) if rows else torch.zeros(0)
        found = self.ranks.gathered((scores, rows, self.scorer.metrics))
        names = dict.fromkeys(name for _, count, metrics in found if count for name in metrics)
        self.metrics = {
            name: sum(count * metrics[name] for _, count, metrics in found if count) / len(prompts) for name in names
        }
        return torch.cat([part for part, _, _ in found])


class SharedReference:
    """A reference in every process, each with some of the parts; as many passes in each, for it may be the policy."""

    def __init__(self, reference: Reference, ranks: Ranks) -> None:
        self.reference, self.ranks = reference, ranks

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_length: int,
        temperature: float,
        parts: Sequence[Tensor],
    ) -> Tensor:
        """Log-probabilities (B, R)."""

        def read(rows: Tensor) -> Tensor:
            given = input_ids[rows], attention_mask[rows], response_length, temperature
            return self.reference.logprobs(*given, [torch.arange(len(rows))])

        return in_order(parts, self.ranks.spread(parts, read)).to(input_ids.device)


def _joined(found: Sequence[Samples]) -> Samples:
    """The samples of several processes, on this one's device, as wide as the widest."""
    width = max(samples.ids.shape[1] for samples in found)

    def rows(name: str) -> Tensor:
        tensors = [getattr(samples, name) for samples in found]
        filled = [torch.nn.functional.pad(t, (0, width - t.shape[1])) if t.ndim == 2 else t for t in tensors]
        return torch.cat(filled).to(device())

    return Samples(rows("ids"), rows("mask"), rows("logprobs"), rows("ended"))
