"""What is asked of the cluster: accepted within bounds, refused with the key and the next move; no secret is shown."""

from pathlib import Path

import pytest

from components.errors import InputError
from pipeline.hardware import TaskResources, Toleration, amount
from pipeline.overrides import resolve
from pipeline.resources import image_of
from pipeline.settings import Settings


def settings(*overrides: str) -> Settings:
    return resolve([Path("default")], overrides)


@pytest.mark.parametrize(
    ("quantity", "size"),
    [("512", 512.0), ("2Ki", 2048.0), ("1.5Gi", 1.5 * 2**30), ("3G", 3e9), ("1Ti", 2.0**40), ("2E", 2e18)],
)
def test_a_quantity_is_read_as_kubernetes_reads_it(quantity: str, size: float) -> None:
    assert amount(quantity) == size


def test_hardware_is_set_task_by_task_and_keeps_what_the_task_had() -> None:
    asked = settings(
        "resources.rl.gpus=8",
        "resources.rl.node_selector={cloud.google.com/gke-accelerator: nvidia-h100-80gb, slots: 8}",
        "resources.rl.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    ).resources
    assert asked.rl.parameters("train:1") == {
        "image": "train:1",
        "cpu": "16",
        "memory": "128Gi",
        "gpus": "8",  # text: Kubeflow's driver reads no number there
        "gpu_type": "nvidia.com/gpu",
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb", "slots": "8"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    assert (asked.rl.shm, asked.upload.shm, asked.upload.gpus) == ("16Gi", "", 0)


def test_an_image_is_the_tasks_own_or_the_one_of_its_kind() -> None:
    chosen = settings("resources.rl.image=registry/rl:2", "images.train=train:1", "images.pipeline=pipeline:1")
    assert [image_of(chosen, task) for task in ("rl", "sft", "upload")] == ["registry/rl:2", "train:1", "pipeline:1"]


def test_a_toleration_is_written_without_what_is_empty() -> None:
    assert Toleration(operator="Exists").manifest() == {"operator": "Exists"}
    assert Toleration(key="spot", value="true").manifest() == {"key": "spot", "operator": "Equal", "value": "true"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resources.rl.gpus=-1", r"resources\.rl\.gpus is -1; accepted: greater than or equal to 0"),
        ("resources.upload.gpus=1", "gives upload gpus 1, and upload runs no model; accepted for base, sft"),
        ("resources.rl.gpu_type=gpu", r"resources\.rl\.gpu_type is 'gpu'; accepted: text that matches"),
        ("resources.rl.cpu=four", r"resources\.rl\.cpu is 'four'"),
        ("resources.rl.memory=64GB", r"resources\.rl\.memory is '64GB'"),
        ("resources.rl.shm=lots", r"resources\.rl\.shm is 'lots'"),
        ("resources.rl.shm=200Gi", "has shm 200Gi, above its memory 128Gi, of which it is a part. Raise memory or"),
        ("resources.rl.memory=8Gi", "has shm 16Gi, above its memory 8Gi"),
        ("resources.rl.node_selector={pool: a b}", r"resources\.rl\.node_selector has pool: 'a b', which no node"),
        ("resources.rl.node_selector={-pool: a}", "has -pool: 'a', which no node can have as a label"),
        ("resources.rl.tolerations=[{key: spot, operator: Exists, value: x}]", r"rl\.tolerations\.0 has the operator"),
        ("resources.rl.tolerations=[{value: x}]", "has no key; name the taint's key, or use the operator Exists"),
        ("resources.rl.tolerations=[{key: x, effect: Never}]", r"tolerations\.0\.effect is 'Never'; accepted: 'NoSch"),
        ("resources.rl.image=two words", r"resources\.rl\.image is 'two words'"),
        ("images.train='{{train}}'", r"images\.train is '\{\{train\}\}'"),
        ("resources.rl.retries=9", r"resources\.rl\.retries is 9; accepted: less than or equal to 8"),
        ("resources.rl.timeout_s=-5", r"resources\.rl\.timeout_s is -5"),
        ("resources.rl.gpu=8", r"did you mean resources\.rl\.gpus\?"),
        ("exchange=jobs", r"exchange is 'jobs'; accepted: text that matches"),
        ("exchange=s3://jobs", r"exchange is 's3://jobs'"),
        ("image_pull_secrets=[No_Name]", r"image_pull_secrets\.0 is 'No_Name'"),
    ],
)
def test_what_no_cluster_can_give_is_refused_with_the_next_move(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        settings(override)


def test_secrets_reach_the_tasks_they_are_for() -> None:
    token, key = settings(
        "secrets=[{name: hub, env: {token: HF_TOKEN}, tasks: [base, rl]}, {name: gcs, mount: /var/secrets/gcs}]"
    ).secrets
    assert [task for task in ("base", "sft", "rl", "notify") if token.reaches(task)] == ["base", "rl"]
    assert all(key.reaches(task) for task in ("demo", "rl", "notify"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("secrets=[{name: hub}]", r"secrets\.0 needs one of env .* and mount"),
        ("secrets=[{name: hub, env: {token: T}, mount: /run/hub}]", r"secrets\.0 needs one of env"),
        ("secrets=[{name: Hub, env: {token: T}}]", r"secrets\.0\.name is 'Hub'"),
        ("secrets=[{name: hub, env: {token: 2ND}}]", "has '2ND', which is no variable's name"),
        ("secrets=[{name: hub, mount: var/hub}]", r"secrets\.0\.mount is 'var/hub'"),
        ("secrets=[{name: hub, mount: /dev/shm}]", "where the system's own files are"),
        ("secrets=[{name: hub.a, mount: /run/hub}]", "has no dots"),
        ("secrets=[{name: hub, env: {a: T}, tasks: [rll]}]", r"0\.tasks has rll; accepted: sources, demo, .*, notify"),
        ("secrets=[{name: a, env: {x: T}}, {name: b, env: {y: T}, tasks: [rl]}]", r"secrets\.0 and secrets\.1 both"),
        ("secrets=[{name: a, mount: /run/a}, {name: a, mount: /run/b}]", "mount the same secret"),
        ("secrets=[{name: a, mount: /run/a}, {name: b, mount: /run/a}]", "or in the same folder"),
    ],
)
def test_a_secret_that_cannot_be_handed_over_is_refused(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        settings(override)


def test_two_secrets_for_different_tasks_may_set_the_same_variable() -> None:
    given = "secrets=[{name: a, env: {x: T}, tasks: [sft]}, {name: b, env: {y: T}, tasks: [rl]}]"
    assert len(settings(given).secrets) == 2


def test_a_variable_set_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"secrets\.0\.env sets HF_HOME, and so does environment"):
        settings("environment.HF_HOME=/cache", "secrets=[{name: a, env: {x: HF_HOME}}]")


def test_plain_variables_are_kept_and_numbers_become_text() -> None:
    given = ["environment.MLFLOW_TRACKING_URI=http://mlflow:5000", "environment.TOKENIZERS_PARALLELISM=0"]
    given += ["environment.GOOGLE_APPLICATION_CREDENTIALS=/var/secrets/gcs/key.json"]
    given += ["environment.PLUMBLINE_MLFLOW=optional"]
    assert settings(*given).environment == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "TOKENIZERS_PARALLELISM": "0",
        "GOOGLE_APPLICATION_CREDENTIALS": "/var/secrets/gcs/key.json",
        "PLUMBLINE_MLFLOW": "optional",
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_TOKEN", "hf_s3cr3t", "HF_TOKEN, which looks like a secret .* env: {key: HF_TOKEN}"),
        ("MLFLOW_TRACKING_PASSWORD", "s3cr3t", "MLFLOW_TRACKING_PASSWORD, which looks like a secret"),
        ("AWS_SECRET_ACCESS_KEY", "s3cr3t", "which looks like a secret"),
        ("openai_api_key", "s3cr3t", "openai_api_key, which looks like a secret"),
        ("GOOGLE_CREDENTIALS", "{s3cr3t: 1}", "which looks like a secret"),
        ("DB_PASSWORD", "53237", "which looks like a secret"),
        ("MLFLOW_TRACKING_URI", "http://me:s3cr3t@mlflow:5000", "an address with a user or a password"),
        ("PLUMBLINE_WEBHOOK", "https://hooks/s3cr3t", "names that start with PLUMBLINE_ are the pipeline's own"),
        ("A-B", "x", "'A-B', which is no name of a variable"),
    ],
)
def test_a_variable_that_looks_secret_is_refused_and_its_value_not_shown(name: str, value: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        settings(f"environment.{name}={value}")
    assert "s3cr3t" not in str(refused.value) and "53237" not in str(refused.value)
    assert "environment" in str(refused.value)


def test_defaults_ask_gpus_and_shared_memory_where_a_model_is_trained_and_nothing_elsewhere() -> None:
    resources = settings().resources
    with_gpus = [task for task in type(resources).model_fields if getattr(resources, task).gpus]
    with_shm = [task for task in type(resources).model_fields if getattr(resources, task).shm]
    assert with_gpus == with_shm == ["sft", "reward", "cost", "rl", "evaluate", "infer"]
    assert TaskResources().timeout_s == 0
