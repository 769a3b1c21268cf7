"""What every step's settings share: the strict base class and the groups that several steps use.

Precedence is decided in `pipeline/overrides.py`: class defaults < configuration files < `key=value`.
"""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Group(BaseModel):
    """A frozen set of settings in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class StepSettings(Group):
    """What every step has: a seed, from which it derives every random choice, and a word to run again."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of this step's random choices; below 2^31, because Kubeflow carries numbers as doubles."""
    rerun: str | None = Field(None, min_length=1)
    """Another word than before makes the step run again, and what follows it, although nothing else has changed."""


class Optimizer(Group):
    """AdamW, its schedule and its clipping."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate. 1e-5 is safe-rlhf's actor rate for 7B models; tiny models want 1e-3."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment (safe-rlhf, OpenRLHF)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator term."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; not applied to vectors (norms, biases)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up, over updates."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of all updates in which the rate rises from zero (safe-rlhf: 0.03)."""
    min_lr: float = Field(0.1, ge=0, le=1)
    """Where the schedule ends, as a share of `lr` (OpenRLHF: 0.1)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm. 1.0 everywhere; async_rlhf clips nothing, a known defect."""
    max_skipped: int = Field(10, ge=0)
    """Updates in a row that may be skipped for a loss or gradient that is not finite; one more fails the step."""


class Compute(Group):
    """How the arithmetic is done, and by how many processes."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps float32 weights and computes in bfloat16; fp16 is not offered."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    processes: int = Field(1, ge=1)
    """Processes in the task's container, or in each pod; one for each GPU there."""
    nodes: int = Field(1, ge=1)
    """Pods with so many processes each; from 2 on they are a Kubeflow TrainJob's (components/trainjob.py)."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """What processes divide: ddp the rows; zero1 AdamW's state, zero2 gradients, zero3 weights too (DeepSpeed)."""
    offload: bool = False
    """AdamW's state in the CPU's memory, which takes its steps: less memory, slower; zero1 to zero3 alone."""

    @model_validator(mode="after")
    def _has_what_to_divide(self) -> Self:
        if self.strategy != "ddp" and self.nodes * self.processes == 1:
            raise ValueError(f"strategy is {self.strategy} and processes is 1: raise processes, or take strategy ddp.")
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload is set and strategy is ddp, which divides nothing: take zero1, zero2 or zero3.")
        return self


class Training(Group):
    """Supervised training: how long, on how much at once, checked how often."""

    epochs: int = Field(1, ge=1)
    """Passes over the training rows."""
    batch_tokens: int = Field(8192, ge=16)
    """Tokens in a micro-batch, padding included; rows are sorted by length so that little is padding."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches of each process in one update."""
    max_length: int = Field(512, ge=8)
    """Tokens of prompt and response together; prompts lose their oldest tokens, responses their last."""
    eval_every: int = Field(0, ge=0)
    """Updates between evaluations on the test split; 0 evaluates at the end only."""
    checkpoint_every: int = Field(0, ge=0)
    """Updates between checkpoints, from which an interrupted step continues; 0 writes one on SIGTERM alone."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many checkpoints are kept; a damaged one is passed over for the one before it."""
    optimizer: Optimizer = Optimizer()
    """AdamW, its schedule and its clipping."""
    compute: Compute = Compute()
    """How the arithmetic is done."""


class Lora(Group):
    """Low-rank adapters; the saved model has them merged, so that any tool loads it.

    A reward or cost model's folder holds them apart, too, in adapter/.
    """

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains the full weights."""
    alpha: int = Field(16, gt=0)
    """Scale of the adapters: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the adapters; 0 keeps the first update's ratio at 1."""


class Generation(Group):
    """How responses are sampled."""

    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts lose their oldest tokens."""
    max_new_tokens: int = Field(128, ge=1)
    """A response ends at the end-of-sequence token or after this many tokens."""
    temperature: float = Field(1.0, ge=0)
    """1.0 samples the policy as it is; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus: the smallest set of tokens with this probability; 1.0 keeps all."""
    top_k: int = Field(0, ge=0)
    """Only the k likeliest tokens; 0 keeps all."""
    batch_size: int = Field(64, ge=1)
    """Responses decoded at once."""


def web_address(url: str) -> str:
    """The URL itself. Raises ValueError when it is no address, or holds a user or a password."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable:
        raise ValueError("is no web address; accepted: one such as http://server:8000/path.")
    if "@" in parts.netloc:
        raise ValueError("names a user or a password; name an environment variable with a token in token_env.")
    return url


WebAddress = Annotated[str, AfterValidator(web_address)]
"""http:// or https://, without user or password."""


class ServerSettings(Group):
    """How a server is reached."""

    url: WebAddress
    """The server's address: http:// or https://, without user or password."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds to wait for the server to accept a request, and then to answer it."""
    retries: int = Field(5, ge=0)
    """Further attempts after a time-out, a broken connection, 429 or 5xx; 5 bridge half a minute."""
    backoff_s: float = Field(1.0, ge=0)
    """Seconds before the second attempt; each further wait is twice the one before."""
    token_env: str = ""
    """Name of the environment variable that holds the bearer token; empty sends none."""


class ModelScorerSettings(Group):
    """Scores from the model that the reward or cost task trained."""

    kind: Literal["model"] = "model"
    """Where scores come from."""


class EnsembleScorerSettings(Group):
    """Scores from all models that the reward or cost task trained; it needs `members` of 2 or more."""

    kind: Literal["ensemble"] = "ensemble"
    """Where scores come from."""
    aggregate: Literal["mean", "worst", "bound"] = "mean"
    """mean of the members; worst: min of rewards, max of costs; bound: mean minus k standard deviations of rewards,
    plus of costs."""
    k: float = Field(1.0, ge=0)
    """Standard deviations between members by which `bound` departs from the mean; 0 is the mean."""


class FunctionScorerSettings(Group):
    """Scores from a Python function of prompts and responses."""

    kind: Literal["function"] = "function"
    """Where scores come from."""
    name: str = Field(min_length=1)
    """`module:function`, or the name of an entry point in the group plumbline.scorers."""


class UrlScorerSettings(ServerSettings):
    """Scores from a server; components/scoring/remote.py describes the protocol."""

    kind: Literal["url"] = "url"
    """Where scores come from."""
    batch_size: int = Field(64, ge=1)
    """Responses in one request, which is posted to `url`."""


ScorerSettings = Annotated[
    ModelScorerSettings | EnsembleScorerSettings | FunctionScorerSettings | UrlScorerSettings,
    Field(discriminator="kind"),
]
"""Where the scores of responses come from, chosen by `kind`."""


class NativeSamplerSettings(Group):
    """Responses from our own decoder, in the process that trains."""

    kind: Literal["native"] = "native"
    """What samples responses."""


class VllmSamplerSettings(ServerSettings):
    """Responses from a vLLM server; components/generation/README.md says how it is started.

    `url` is the server's address without the /v1 of its API; `token_env` names what holds its --api-key.
    """

    kind: Literal["vllm"] = "vllm"
    """What samples responses."""
    weights: str = Field(min_length=1)
    """A folder that this process writes and the server reads under the same path: weights pass through it."""
    concurrency: int = Field(64, ge=1)
    """Requests under way at once, each for all responses to one prompt; what the server batches it decides itself."""
    timeout_s: float = Field(600.0, gt=0)
    """As for every server; loading weights may take minutes."""


SamplerSettings = Annotated[NativeSamplerSettings | VllmSamplerSettings, Field(discriminator="kind")]
"""What samples the responses to learn from, chosen by `kind`."""


class OverlapSettings(Group):
    """Responses sampled ahead, in a process of its own, while the batches before are learned from."""

    staleness: int = Field(1, ge=0)
    """Batches that may be learned from between the weights that a batch is sampled with and the batch itself; 0
    samples when nothing is learned, with the very numbers of no overlap."""
    restarts: int = Field(3, ge=0)
    """How often in a row the process is started again when it died before it had made a batch."""
    limit_s: float = Field(3600.0, gt=0)
    """Seconds that one batch may take, for the first with all that has to be loaded; after that the process counts as
    dead."""
    threads: int | None = Field(None, ge=1)
    """Threads of that process; absent takes half of those there are. The process that trains has the others; with a
    staleness of 0, where the two take turns, both have all."""
    gpu: int | None = Field(None, ge=0)
    """The GPU of that process, by its number; absent takes the second, or the one there is."""
