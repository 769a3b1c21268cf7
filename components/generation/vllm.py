"""Responses from a vLLM server, which is given the policy's weights before every batch.

For each batch: the server is paused, which ends what it still computes and empties its caches of keys and values; it
reads the weights from a folder that both reach; they get a version, which is checked again after the batch; prompts go
out as token ids, one request each for its k responses, and token ids come back with their log-probabilities. The
server's tokenizer and defaults have no say. Its paths beside /v1 exist only where it runs with VLLM_SERVER_DEV_MODE=1.

Shapes: B rows (prompt-major), R response tokens.
"""

import hashlib
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import torch
from torch import Tensor

from components.adapters import merged_tensors
from components.artifacts import Metrics
from components.endpoint import Endpoint
from components.errors import InputError
from components.generation import Samples
from components.generation.completions import SLACK, Completion, completions, prompt_logprobs
from components.generation.weights import shared_weights
from components.logprobs import response_logprobs
from components.models import end_ids
from components.phases import Phases
from components.ranks import ALONE, Ranks
from components.settings import Generation, VllmSamplerSettings
from components.tokens import pad

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

KEY = "rl.sampler"
FLAGS = "VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs"
START = "Start it with the folder of the policy that rl starts from, as components/generation/README.md says."
MAX_PROBE_GAP = 0.5
"""Nats per token by which server and policy may differ on a prompt; dtypes explain a tenth of it."""
PLAIN = {
    "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True,
    "add_special_tokens": False, "return_token_ids": True, "logprobs": 0,
}  # fmt: skip
"""What a server may have another default for; 0 log-probabilities are those of the sampled tokens alone."""


FROM_FILES = {"method": "update_config", "kwargs": {"overrides": {"load_config": {"load_format": "auto"}}}}
"""A server that started with random weights (--load-format dummy) would reload random ones."""


class VllmSampler:
    """Samples the policy from a vLLM server, with which the first of the processes that hold the policy talks."""

    on_policy = False

    def __init__(
        self,
        settings: VllmSamplerSettings,
        policy: Any,
        eos_token_id: int,
        generation: Generation,
        seed: int,
        phases: Phases | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Raises InputError when the server is absent, or is none that this sampler can use."""
        self.settings, self.policy, self.generation, self.seed = settings, policy, generation, seed
        self.eos, self.ends, self.ranks = eos_token_id, end_ids(policy, eos_token_id), ranks
        self.phases, self.endpoint = phases or Phases(), Endpoint(settings, KEY)
        self.number = 0
        """Batches sampled so far."""
        self.metrics: Metrics = {}
        self._run = uuid.uuid4().hex[:8]
        with self.endpoint.client() as client:
            self._model = self._served_model(client)

    def sample(self, prompts: Sequence[Sequence[int]], k: int = 1) -> Samples:
        """`k` responses to each prompt from the policy as it is now.

        Raises InputError when the server fails, computes another model, answers in another form, or lost the weights.
        """
        with self.phases.phase("decode"):
            with self.phases.phase("weights"):
                tensors = merged_tensors(self.policy)
            ours = self._own_logprobs([*prompts[0], *self.ends])
            found = self.ranks.first(lambda: self._asked(prompts, k, tensors, ours))
        self.metrics = {"sampler/version": float(self.number)}
        self.number += 1
        samples = self._samples(found)
        self.phases.count("decode", int(samples.mask.sum()))
        return samples

    def _asked(
        self, prompts: Sequence[Sequence[int]], k: int, tensors: dict[str, Tensor], ours: Tensor
    ) -> list[Completion]:
        """What the server samples, once it has these weights and says `ours` of the first prompt."""
        version = f"{self._run}-{self.number}"
        with self.endpoint.client() as client:
            with self.phases.phase("weights"):
                self._publish(client, tensors, version)
            self._refuse_another_model(client, [*prompts[0], *self.ends], ours)
            requests = [self._request(prompt, row, k) for row, prompt in enumerate(prompts)]
            found = in_threads(lambda request: self._complete(client, request), requests, self.settings.concurrency)
            self._refuse_other_weights(client, version)
        return [completion for group in found for completion in group]

    def state(self) -> Tensor:
        """How many batches were sampled: the seeds of the requests follow from it."""
        return torch.tensor([self.number])

    def restore(self, state: Tensor) -> None:
        """Take back what `state` gave."""
        self.number = int(state)

    def _publish(self, client: httpx.Client, tensors: dict[str, Tensor], version: str) -> None:
        """Give the server the policy's weights, under `version`; nothing of the old ones stays in its caches."""
        with shared_weights(self.policy, tensors, self.settings.weights, f"{KEY}.weights") as folder:
            self._ask(client, "POST", "/pause?mode=abort")
            for call in (FROM_FILES, {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}):
                self._ask(client, "POST", "/collective_rpc", call)
            self._ask(client, "POST", "/update_weight_version", {"new_version": version})
            self._ask(client, "POST", "/resume")

    def _request(self, prompt: Sequence[int], row: int, k: int) -> dict[str, Any]:
        """The body of a request for `k` responses to the prompt that is number `row` of its batch."""
        generation = self.generation
        return PLAIN | {
            "model": self._model,
            "prompt": list(prompt),
            "n": k,
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": generation.top_k,
            "stop_token_ids": self.ends,
            "seed": request_seed(self.seed, self.number, row),
        }

    def _complete(self, client: httpx.Client, request: dict[str, Any]) -> list[Completion]:
        return self._completions(self._ask(client, "POST", "/v1/completions", request), request)

    def _completions(self, body: Any, request: dict[str, Any]) -> list[Completion]:
        size = self.policy.config.get_text_config().vocab_size
        return completions(body, request["n"], request["max_tokens"], self.ends, size, self.endpoint.name)

    def _samples(self, rows: Sequence[Completion]) -> Samples:
        ids, mask = pad([row.ids for row in rows], self.eos)
        logprobs = torch.zeros(ids.shape).masked_scatter(mask, torch.tensor([x for row in rows for x in row.logprobs]))
        ended = torch.tensor([row.ended for row in rows])
        device = next(self.policy.parameters()).device
        return Samples(ids.to(device), mask.to(device), logprobs.to(device), ended.to(device))

    def _served_model(self, client: httpx.Client) -> str:
        """The name of the one model that the server has, which must hold a whole prompt and response."""
        body = self._ask(client, "GET", "/v1/models")
        listed = body.get("data") if isinstance(body, dict) else None
        entries = [item for item in listed or () if isinstance(item, dict) and item.get("parent") is None]
        if len(entries) != 1 or not isinstance(entries[0].get("id"), str):
            raise InputError(f"{self.endpoint.name} serves {len(entries)} models; expected: a vLLM server with one.")
        room, generation = entries[0].get("max_model_len"), self.generation
        needed = generation.max_prompt_tokens + generation.max_new_tokens
        if isinstance(room, int) and room < needed:
            raise InputError(
                f"{self.endpoint.name} holds {room} tokens; rl.generation asks for {generation.max_prompt_tokens} of "
                f"prompt and {generation.max_new_tokens} of response. Start it with --max-model-len {needed}, or lower "
                "max_prompt_tokens or max_new_tokens."
            )
        return str(entries[0]["id"])

    @torch.no_grad()
    def _own_logprobs(self, probe: list[int]) -> Tensor:
        """What the policy says of the probe but its first token; read by every process, for ZeRO's sake."""
        ids = torch.tensor([probe], device=next(self.policy.parameters()).device)
        read = response_logprobs(self.policy, ids, torch.ones_like(ids, dtype=torch.bool), len(probe) - 1)
        return read[0].cpu()

    def _refuse_another_model(self, client: httpx.Client, probe: list[int], ours: Tensor) -> None:
        """Raise InputError when the server, given the policy's weights, computes something else: a prompt is compared.

        It may serve another architecture, or keep some of the old weights, as vLLM 0.32 does on CPU with tied heads.
        It may also give log-probabilities of another distribution than the one sampled: where one token alone is
        allowed that distribution gives it all, a log-probability of 0.
        """
        lone = {"n": 1, "max_tokens": 1, "allowed_token_ids": [self.eos], "prompt_logprobs": 0}
        request = self._request(probe, 0, 1) | lone
        body = self._ask(client, "POST", "/v1/completions", request)
        logprob = self._completions(body, request)[0].logprobs[0]
        if abs(logprob) > SLACK:
            raise InputError(
                f"{self.endpoint.name} gives log-probabilities from before temperature and truncation ({logprob:.3g} "
                f"for a token without alternative, not 0). Start it with {FLAGS}."
            )
        theirs = prompt_logprobs(body, probe, self.endpoint.name)
        gap = float((torch.tensor([theirs]) - ours).abs().mean())
        if not gap <= MAX_PROBE_GAP:
            raise InputError(
                f"{self.endpoint.name} has the policy's weights and yet log-probabilities that differ from the "
                f"policy's by {gap:.3g} nats per token of a prompt; accepted: {MAX_PROBE_GAP}. It serves another "
                f"architecture, or did not take all of the weights. {START}"
            )

    def _refuse_other_weights(self, client: httpx.Client, version: str) -> None:
        """Raise InputError unless the server still has the weights of this version: it had them all along then."""
        body = self._ask(client, "GET", "/weight_info")
        now = body.get("weight_version") if isinstance(body, dict) else body
        if now != version:
            raise InputError(
                f"{self.endpoint.name} has the weights of version {now!r}; this run gave it {version!r}. It was "
                "started anew, or another run uses it too. Give each run a server of its own, and start again: the run "
                "continues from its newest checkpoint."
            )

    def _ask(self, client: httpx.Client, method: str, path: str, json: Any = None) -> Any:
        """The JSON of the answer. Raises InputError for any status but 200."""
        expected = f"a vLLM server of the policy's architecture, started with {FLAGS}"
        answer = self.endpoint.ask(client, expected, method, path, json)
        if not answer.is_success:
            shown = self.endpoint.shown(answer)
            raise InputError(f"{self.endpoint.name}{path} answered {shown}. Expected: {expected}.")
        try:
            return answer.json()
        except ValueError:
            raise InputError(
                f"{self.endpoint.name}{path} answered {self.endpoint.shown(answer)}, which is no JSON. Expected: "
                f"{expected}."
            ) from None


def request_seed(seed: int, number: int, row: int) -> int:
    """The seed of a request, from the run's, the number of the batch and the prompt's row in it.

    Below 2^62, so that the server may count up from it, one for each response, within 64 bits.
    """
    digest = hashlib.sha256(f"{seed} {number} {row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """The function's results in order. The first error, or a stop, ends the waiting for the others."""
    pool = ThreadPoolExecutor(min(threads, len(items)))
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
