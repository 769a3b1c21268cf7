"""The tasks of a run in containers of this machine, as locked up as on a cluster.

A container runs as a user without rights, with a root file system that it cannot write, /tmp in memory, and its
task's limit of memory; of this machine it sees what the task reads and writes (`mounts.py`). kfp's DockerRunner has
its own way of running a container, which can report a step that failed as a success: the container is removed when
it ends, maybe before its exit code is asked for. Here it is removed after that.
"""

import codecs
import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from docker.errors import APIError, ImageNotFound
from kfp import local
from kfp.dsl import PipelineTask
from kfp.local import docker_task_handler

from components.errors import InputError
from components.parsing import flattened
from pipeline.engine import engine
from pipeline.hardware import amount
from pipeline.mounts import GOOGLE_KEY, hand_over, mounts
from pipeline.observer import GRACE_S, Start
from pipeline.resources import asked_of, image_of
from pipeline.settings import Settings

USER = 10001
"""The user of the images, whom a container of root's runs as; anybody else's runs as himself."""
MAX_PROCESSES = 4096
PASSED = ("PLUMBLINE_", "MLFLOW_")
"""Variables that steps see begin like this, ..."""
PASSED_NAMES = {
    "GOOGLE_CLOUD_PROJECT", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY",
    "OMP_NUM_THREADS", "STORAGE_EMULATOR_HOST",
}  # fmt: skip
"""... or are called this, or are named in the settings; other paths of this machine mean nothing in a container."""


@contextmanager
def containers(settings: Settings, runs_dir: Path, network: str) -> Iterator["Containers"]:
    """What runs the tasks of these settings, which are anchored, in containers.

    Raises InputError without a container engine, or when it does not have the images.
    """
    with engine() as client:
        names = {task: image_of(settings, task) for task in settings.tasks()}
        identities = {name: image_id(client, name) for name in sorted(set(names.values()))}
        images = {task: identities[name] for task, name in names.items()}
        yield Containers(settings, runs_dir, images, network)


class Containers:
    """Runs the commands of tasks in containers of the images, given by task."""

    replaces = (docker_task_handler, "run_docker_container")

    def __init__(self, settings: Settings, runs_dir: Path, images: Mapping[str, str], network: str) -> None:
        self._images, self._mounts = images, mounts(settings, runs_dir)
        self._memory = {task: int(amount(asked_of(settings, task).memory)) for task in images}
        stated = flattened(settings.model_dump())
        self._names = PASSED_NAMES | {value for key, value in stated if key.endswith(".token_env")}
        user = os.getuid() or USER
        self.kfp = local.DockerRunner(
            user=f"{user}:{os.getgid() or USER}",
            read_only=True,
            tmpfs={"/tmp": "rw,exec,nosuid,nodev"},  # DeepSpeed loads what it compiles there
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", "label=disable"],  # SELinux would hide the mounts
            pids_limit=MAX_PROCESSES,
            network_mode=network,
        )

    def equip(self, task: str, node: PipelineTask) -> None:
        """Put its image on a task, by identity: another build of it is another key in the cache."""
        node.set_container_image(self._images[task])

    def start(
        self, start: Start, client: Any, image: str, command: list[str], volumes: Mapping[str, Any], **options: Any
    ) -> int:
        """Run the command to its end, in a container that is gone afterwards.

        kfp's `volumes` are left out: its folder lies in ours, and a missing one the engine would make root's.
        """
        for mount in self._mounts:
            if mount.writable and os.getuid() == 0:
                hand_over(mount.path, USER)
        container = client.containers.create(
            image,
            command,
            volumes={str(mount.path): mount.volume() for mount in self._mounts},
            environment={**self._passed(), **start.environment, **options.pop("environment", {})},
            mem_limit=self._memory[start.task],
            **options,
        )
        printed = 0
        try:
            container.start()
            for printed, line in enumerate(lines(container.logs(stream=True)), start=1):  # noqa: B007  # if it stops
                start.printed(line)
            return int(container.wait()["StatusCode"])
        except BaseException:
            _end(container, start, printed)
            raise
        finally:
            container.remove(force=True)

    def _passed(self) -> dict[str, str]:
        """Those of our own variables that steps see."""
        key_file = os.environ.get(GOOGLE_KEY)
        place = {GOOGLE_KEY: str(Path(key_file).absolute())} if key_file else {}
        names = os.environ.keys()
        return place | {name: os.environ[name] for name in names if name.startswith(PASSED) or name in self._names}


def image_id(client: Any, name: str) -> str:
    """The identity of an image that the engine has. Raises InputError when it has none of that name."""
    for full in (name, f"localhost/{name}"):  # Podman's name for an image of one's own
        with suppress(ImageNotFound):
            return str(client.images.get(full).id)
    raise InputError(f"the image {name} is not on this machine. Build the images with make images, or pull it.")


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines in a stream of bytes that is cut anywhere, each with its newline."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    waiting = ""
    for chunk in chunks:
        *whole, waiting = (waiting + decoder.decode(chunk)).split("\n")
        yield from (f"{line}\n" for line in whole)
    if waiting := waiting + decoder.decode(b"", final=True):
        yield f"{waiting}\n"


def _end(container: Any, start: Start, printed: int) -> None:
    """Ask the container's processes to end; make them after GRACE_S, or when a person asks once more."""
    timer = threading.Timer(GRACE_S, _kill, (container,))
    timer.start()
    try:
        with suppress(APIError):  # it ended by itself
            container.kill("SIGTERM")  # its first process alone, and a shell that is the first takes no notice ...
            container.exec_run(["sh", "-c", "kill -TERM -1"])  # ... so all the others are asked too
        for line in islice(lines(container.logs(stream=True)), printed, None):
            start.printed(line)
    finally:
        timer.cancel()


def _kill(container: Any) -> None:
    with suppress(APIError):
        container.kill()
