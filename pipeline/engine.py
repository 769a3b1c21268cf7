"""The container engine of this machine: Docker where it answers, else Podman, whose Docker interface is started."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import docker
from docker.errors import DockerException

from components.errors import InputError
from pipeline.surroundings import environment

HOST = "DOCKER_HOST"
START_S = 60.0
"""How long Podman may take until its interface answers."""


@contextmanager
def engine() -> Iterator[Any]:
    """A client of the engine, whose address is DOCKER_HOST meanwhile. Raises InputError when there is none."""
    if client := _answering():
        with closing(client):
            yield client
    elif os.environ.get(HOST):
        raise InputError(f"{HOST} is {os.environ[HOST]}; no container engine answers there. Start it, or unset {HOST}.")
    elif podman := shutil.which("podman"):
        with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
            address = f"unix://{scratch}/podman.sock"
            with environment({HOST: address}), _service(podman, address) as client:
                yield client
    else:
        raise InputError("no container engine answers. Start Docker, or install Podman (see containers/README.md).")


@contextmanager
def _service(podman: str, address: str) -> Iterator[Any]:
    """A client of Podman's Docker interface, which runs as long as the block."""
    names = {} if os.getuid() == 0 else {"PODMAN_USERNS": "keep-id"}  # a container's user is the one who started it
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [podman, "system", "service", "--time=0", address],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **names},
            start_new_session=True,  # Ctrl-C is for the run, which still has containers to stop
        )
        try:
            with closing(_client_of(process, log)) as client:
                yield client
        finally:
            process.terminate()
            process.wait()


def _client_of(process: "subprocess.Popen[bytes]", log: Any) -> Any:
    """A client, as soon as Podman answers. Raises InputError with Podman's words when it does not."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if client := _answering():
            return client
        time.sleep(0.1)
    log.seek(0)
    words = log.read().decode(errors="replace").strip() or f"no answer in {START_S:.0f} s"
    raise InputError(f"podman system service does not run: {words[-500:]}")


def _answering() -> Any:
    """A client of the engine at DOCKER_HOST or at Docker's own address; None when nothing answers there."""
    client = None
    try:
        client = docker.from_env()
        client.ping()
    except DockerException:
        if client is not None:
            client.close()
        return None
    return client
