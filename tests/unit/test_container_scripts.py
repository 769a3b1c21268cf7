"""The scripts of containers/, with stand-ins for docker and podman that write down what they were asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
if [ "$1" = info ]; then exit {answers}; fi
for word in "$@"; do
    case "$word" in id=pip.conf,src=*) cat "${{word#id=pip.conf,src=}}" >> {folder}/pip.conf ;; esac
done
echo "{name} $*" >> {folder}/asked
"""


class Machine:
    """A machine with these engines; each answers or does not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "PIP_CONFIG_FILE": os.devnull}

    def engine(self, name: str, answers: bool = True) -> None:
        path = self.folder / name
        path.write_text(STAND_IN.format(name=name, folder=self.folder, answers=0 if answers else 1))
        path.chmod(0o755)

    def run(self, script: str, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [str(ROOT / "containers" / script), *words]
        given = self.environment | environment
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False)

    def asked(self) -> list[str]:
        """What the engines were asked to build, a line each."""
        lines = (self.folder / "asked").read_text().splitlines()
        return [line for line in lines if line.split()[1] == "build"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_docker_is_taken_where_it_answers_and_podman_where_it_does_not(machine: Machine) -> None:
    machine.engine("podman")
    assert machine.run("engine.sh").stdout == "podman\n"
    machine.engine("docker", answers=False)  # a command line without its daemon
    assert machine.run("engine.sh").stdout == "podman\n"
    machine.engine("docker")
    assert machine.run("engine.sh").stdout == "docker\n"


@pytest.mark.parametrize("script", ["engine.sh", "build.sh", "base.sh"])
def test_without_an_engine_a_person_is_told_what_to_install(machine: Machine, script: str) -> None:
    machine.engine("docker", answers=False)
    machine.engine("podman", answers=False)
    done = machine.run(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("No container engine answers. Start Docker, or install Podman")
    assert len(done.stderr.splitlines()) == 1


def test_a_build_has_a_tag_labels_and_nothing_of_this_machine_unless_pip_is_configured(machine: Machine) -> None:
    machine.engine("docker")
    assert machine.run("build.sh").returncode == 0
    lines = machine.asked()
    files = [line.split("--file ")[1].split()[0] for line in lines]
    assert files == [f"containers/{name}.Dockerfile" for name in ("pipeline", "train", "serve")]
    assert [line.split("--tag ")[1] for line in lines] == [
        "plumbline/pipeline:0.1.0 .", "plumbline/train:0.1.0 .", "plumbline/serve:0.1.0 .",
    ]  # fmt: skip
    assert all("--build-arg VERSION=0.1.0 --build-arg REVISION=" in line for line in lines)
    assert not [word for line in lines for word in ("--secret", "--volume", "--format", "BASE_IMAGE") if word in line]


def test_podman_keeps_the_health_check_and_sees_folders_that_pip_is_configured_with(machine: Machine) -> None:
    machine.engine("podman")
    configured = {
        "PIP_INDEX_URL": "https://me:hush@index.example.com/simple",
        "PIP_FIND_LINKS": "/wheels",
        "PIP_EXTRA_INDEX_URL": "file:///mirror/simple",
        "PIP_CERT": "/etc/certificates.crt",
        "BASE_IMAGE": "base@sha256:1",
        "IMAGE_FLAGS": "--squash --pull=never",
    }
    assert machine.run("build.sh", "serve", **configured).returncode == 0
    (line,) = machine.asked()
    for words in (
        "--format docker",
        "--volume /wheels:/wheels:ro",
        "--volume /mirror:/mirror:ro",
        "--secret id=ca.crt,src=/etc/certificates.crt",
        "--build-arg BASE_IMAGE=base@sha256:1",
        "--squash --pull=never",
    ):
        assert words in line
    assert "hush" not in line
    assert "index-url = https://me:hush@index.example.com/simple" in (machine.folder / "pip.conf").read_text()


def test_docker_says_which_folders_it_will_not_see(machine: Machine) -> None:
    machine.engine("docker")
    done = machine.run("build.sh", "serve", PIP_FIND_LINKS="/wheels")
    assert "find-links is /wheels, a folder that a build with docker does not see" in done.stderr
    assert "--volume" not in machine.asked()[0]


def test_a_base_image_that_is_named_is_the_base_image(machine: Machine) -> None:
    assert machine.run("base.sh", BASE_IMAGE="python@sha256:2").stdout == "python@sha256:2\n"


def test_the_official_base_image_is_taken_where_it_can_be_pulled(machine: Machine) -> None:
    machine.engine("docker")
    assert machine.run("base.sh").stdout == "docker.io/library/python:3.11-slim-bookworm\n"
