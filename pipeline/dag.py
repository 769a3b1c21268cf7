"""The pipeline: which task follows which. The only file that knows the order.

Every step has one dict parameter with its settings, so Kubeflow's run form shows a box per step and a task's
cache key depends on its own settings, its inputs and the fingerprint of the code behind it. The algorithm
decides the shape at compile time; the one condition Kubeflow itself evaluates is the gate. For a cluster the tasks
have parameters for their hardware too (`resources.py`); one more task looks at the sources first, and one says how
the run ended.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from components.base.component import base
from components.demo.component import demo
from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.infer.component import infer
from components.notify.component import notify
from components.preprocess.component import preprocess
from components.reward.component import reward
from components.rl.component import rl
from components.sft.component import sft
from components.upload.component import upload
from components.validate.component import validate
from pipeline.resources import Equip, Equipment
from pipeline.settings import NOTIFY, SOURCES, Settings
from pipeline.sources import READERS, sources


def build(settings: Settings, *, fingerprints: Mapping[str, str] | None = None, equip: Equip | None = None) -> Any:
    """The Kubeflow pipeline of the settings, ready to compile or to run locally.

    `fingerprints` (by task) enter the cache keys; `equip` puts on the tasks what the place they run at asks for. On a
    cluster the run has parameters for it, a task that looks at the sources first (a run on this machine has looked
    before it starts), and one that says at the end how it went.
    """
    tasks = settings.tasks()
    defaults = {task: settings.step(task).model_dump(mode="json", exclude_none=True) for task in tasks}
    cluster = equip if isinstance(equip, Equipment) else None
    if cluster is not None:
        defaults |= cluster.parameters()

    def wire(*parameters: Any) -> None:
        given = dict(zip(defaults, parameters, strict=True))
        if cluster is None:
            _wire(_Nodes(given, fingerprints or {}, equip), settings.rl.teachers)
        else:
            with dsl.ExitHandler(_ending(settings.name, cluster), "run"):
                nodes = _Nodes(given, fingerprints or {}, cluster.given(given))
                nodes.watch_sources()
                _wire(nodes, settings.rl.teachers)

    wire.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # kfp reads the parameters from here
        [
            inspect.Parameter(
                name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=type(default)
            )
            for name, default in defaults.items()
        ]
    )
    description = f"RLHF with {settings.rl.algorithm.name}: from raw feedback to a promoted, served model."
    return dsl.pipeline(wire, name=settings.name, description=description)


def _ending(pipeline: str, cluster: Equipment) -> Any:
    """The task that runs when all others have ended, however they did."""
    node = notify(pipeline=pipeline)
    node.set_display_name(NOTIFY)
    node.set_caching_options(False)  # what it says of one run is not true of another
    cluster(NOTIFY, node)
    return node


class _Nodes:
    """Makes the tasks: each gets its settings, its name, its fingerprint and what it asks of the cluster."""

    def __init__(self, parameters: Mapping[str, Any], fingerprints: Mapping[str, str], equip: Equip | None) -> None:
        """`parameters` are the run's, by name: a task's own has its settings."""
        self.parameters, self.equip = parameters, equip
        self.fingerprints: Mapping[str, Any] = fingerprints

    def __contains__(self, task: str) -> bool:
        return task in self.parameters

    def add(self, component: Any, task: str, **inputs: Any) -> Any:
        node = component(
            settings=self.parameters[task],
            task=task,
            fingerprint=self.fingerprints.get(task, ""),
            **{name: value for name, value in inputs.items() if value is not None},
        )
        node.set_display_name(task)
        if self.equip is not None:
            self.equip(task, node)
        return node

    def watch_sources(self) -> None:
        """Put what is behind the addresses when a run starts into the fingerprints of the tasks that read it."""
        found = sources(
            **{task: self.parameters[task] for task in READERS},
            code={task: self.fingerprints.get(task, "") for task in READERS},
            demo="demo" in self,
        )
        found.set_display_name(SOURCES).set_caching_options(False)
        if self.equip is not None:
            self.equip(SOURCES, found)
        self.fingerprints = {**self.fingerprints, **{task: found.outputs[task] for task in READERS}}


def _wire(nodes: _Nodes, teachers: Sequence[str]) -> None:
    """The tasks and what each of them reads; rl learns from the `teachers` among the scalar models."""
    raw = nodes.add(demo, "demo").outputs["raw"] if "demo" in nodes else None
    data = nodes.add(preprocess, "preprocess", raw=raw).outputs["data"]
    start = nodes.add(base, "base", raw=raw, data=data).outputs["base"]
    checked = nodes.add(validate, "validate", data=data, base=start)
    # nothing is trained before the data is known to be good
    baseline = nodes.add(sft, "sft", data=data, base=start).after(checked).outputs["model"]
    scorers = {"reward": nodes.add(reward, "reward", data=data, sft=baseline).outputs["model"]}
    if "cost" in nodes:
        scorers["cost"] = nodes.add(reward, "cost", data=data, sft=baseline).outputs["model"]
    learned_from = {name: scorers[name] for name in teachers}
    policy = nodes.add(rl, "rl", data=data, policy=baseline, **learned_from).outputs["model"]
    judged = nodes.add(evaluate, "evaluate", data=data, policy=policy, baseline=baseline, **scorers)
    with dsl.If(judged.outputs["Output"] == True, "passed"):  # noqa: E712  # builds an expression
        release = nodes.add(upload, "upload", model=policy, report=judged.outputs["report"]).outputs["release"]
        deployment = nodes.add(deploy, "deploy", release=release).outputs["deployment"]
        nodes.add(infer, "infer", data=data, release=release, deployment=deployment, **scorers)
