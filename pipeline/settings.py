"""Everything that can be set: one field per step, and what the pipeline adds around the steps."""

from typing import Self

from pydantic import Field, model_validator

from components.base.settings import BaseSettings
from components.demo.settings import DemoSettings
from components.deploy.settings import DeploySettings
from components.evaluate.settings import EvaluateSettings
from components.infer.settings import InferSettings
from components.preprocess.settings import PreprocessSettings
from components.reward.settings import RewardSettings
from components.rl.settings import RLSettings
from components.settings import Group, StepSettings
from components.sft.settings import SFTSettings
from components.upload.settings import UploadSettings
from components.validate.settings import ValidateSettings
from pipeline.hardware import Images, Resources
from pipeline.secrets import Environment, Secret, SecretName, contradictions

TASKS = (
    "demo",
    "preprocess",
    "base",
    "validate",
    "sft",
    "reward",
    "cost",
    "rl",
    "evaluate",
    "upload",
    "deploy",
    "infer",
)
SOURCES = "sources"
"""The task that a cluster runs first; a local run looks at its sources before it starts."""
NOTIFY = "notify"
"""The task that a cluster runs last, however the others ended; a local run says itself how it ended."""


class Settings(Group):
    """One run of the pipeline."""

    name: str = Field("plumbline", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    """Name of the pipeline and of the MLflow experiment: lower case, digits and dashes."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """The seed of every step that states none itself."""
    demo: DemoSettings | None = None
    """The demo world, as the source of the data; absent with data of your own."""
    preprocess: PreprocessSettings = PreprocessSettings()
    """From sources of any accepted format to one clean, split data folder."""
    base: BaseSettings = BaseSettings()
    """The model that training starts from."""
    validate: ValidateSettings = ValidateSettings()  # type: ignore[assignment]  # a step's name, not pydantic's method
    """What data and base model have to satisfy."""
    sft: SFTSettings = SFTSettings()
    """Supervised fine-tuning."""
    reward: RewardSettings = RewardSettings()
    """The reward model."""
    cost: RewardSettings = RewardSettings(kind="cost", dimension="harmless")
    """The cost model; trained where the algorithm needs one."""
    rl: RLSettings = RLSettings()
    """Reinforcement learning."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """The comparison with the SFT model, and the thresholds of the gate."""
    upload: UploadSettings = UploadSettings()
    """Where a model that passed is published."""
    deploy: DeploySettings = DeploySettings()
    """Where it is served."""
    infer: InferSettings = InferSettings()
    """The prompts answered with the deployed model."""
    checkpoints: str | None = Field(None, min_length=1)
    """Where training keeps its checkpoints, so that a task that is tried again continues: a gs:// address, or a folder
    that every attempt sees. Absent, a local run keeps them beside its runs, a cluster's task beside its output."""
    exchange: str | None = Field(None, pattern=r"^(gs:/)?/[^\s{}]+$")
    """Where inputs and results of a task with compute.nodes above 1 pass between its machines: a gs:// address, or the
    absolute path of a folder that the cluster puts into every pod. What lies there is removed when the task ends;
    checkpoints are kept there, too, where `checkpoints` is absent. Such a task needs it."""
    resources: Resources = Resources()
    """What each task asks of the cluster."""
    images: Images = Images()
    """The container images of the tasks."""
    environment: Environment = Field({})
    """Variables of every task on a cluster, such as MLFLOW_TRACKING_URI; a local run passes its own environment on."""
    secrets: tuple[Secret, ...] = ()
    """Secrets of the cluster that its tasks get, by name: a token for the hub, a password for MLflow, a key file. With
    one that is PLUMBLINE_WEBHOOK in notify, that address is told how a run ended."""
    image_pull_secrets: tuple[SecretName, ...] = ()
    """Secrets with which the cluster fetches the images, by name."""

    @model_validator(mode="after")
    def _kinds(self) -> Self:
        for task, kind in (("reward", self.reward.kind), ("cost", self.cost.kind)):
            if kind != task:
                raise ValueError(f"{task}.kind is {kind!r}; the {task} task trains a {task} model: leave kind out.")
        return self

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        """Nothing is trained longer than what validate looked at, or than a base model made here can hold."""
        for task in ("base", "sft", "reward", "cost"):
            length = getattr(self, task).training.max_length
            if task != "base" and length > self.validate.max_length:
                raise ValueError(
                    f"{task}.training.max_length is {length}, above validate.max_length {self.validate.max_length}: "
                    "sequences would be trained that validate never looked at. Make them equal."
                )
            self._fits(f"{task}.training.max_length", length)
        for task in ("rl", "evaluate", "infer"):
            generation = getattr(self, task).generation
            self._fits(f"{task}.generation", generation.max_prompt_tokens + generation.max_new_tokens)
        return self

    def _fits(self, key: str, length: int) -> None:
        positions = self.base.max_positions
        if not self.base.model and length > positions:
            raise ValueError(f"{key} needs {length} tokens; base.max_positions is {positions}. Change one of them.")

    @model_validator(mode="after")
    def _dimensions(self) -> Self:
        """What a model learns from is there, so that its absence is found before anything is trained."""
        for task in ("reward", "cost"):
            dimension = getattr(self, task).dimension
            if task in self.tasks() and dimension not in self.validate.dimensions:
                raise ValueError(
                    f"{task}.dimension is {dimension}; validate.dimensions is [{', '.join(self.validate.dimensions)}]. "
                    f"Add {dimension} there, so that data without it is refused before anything is trained."
                )
        return self

    @model_validator(mode="after")
    def _ensembles(self) -> Self:
        """A scorer that wants several models finds several."""
        for task, scorer in (("reward", self.rl.reward_scorer), ("cost", self.rl.cost_scorer)):
            if scorer.kind == "ensemble" and getattr(self, task).members < 2:
                raise ValueError(
                    f"rl.{task}_scorer.kind is ensemble; {task}.members is {getattr(self, task).members}. Set it to 2 "
                    "or more, so that there are models to disagree."
                )
        return self

    @model_validator(mode="after")
    def _surroundings(self) -> Self:
        """Every task's variables and files can be put in place."""
        if problem := next(contradictions(self.secrets, self.environment, (SOURCES, *TASKS, NOTIFY)), ""):
            raise ValueError(problem)
        return self

    def tasks(self) -> tuple[str, ...]:
        """The tasks of the pipeline these settings describe, in order."""
        absent = {"demo"} if self.demo is None else set()
        if "cost" not in self.rl.teachers:
            absent.add("cost")
        return tuple(task for task in TASKS if task not in absent)

    def step(self, task: str) -> StepSettings:
        """The settings of a task's step."""
        settings = getattr(self, task)
        assert isinstance(settings, StepSettings)
        return settings
