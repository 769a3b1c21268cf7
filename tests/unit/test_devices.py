"""No operation of a training step mixes tensors of two devices; a device that is not there tells, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORKS = ("ppo_lag", "online_dpo", "dpo", "lora", "again", "sft", "cost")

RULES = """
import torch
from pretend_gpu import GPU, Dispatch, Pretended

def refused(operation):
    try:
        operation()
    except RuntimeError as error:
        return "of the CPU among those of the GPU" in str(error)
    return False

with Dispatch():
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).to(GPU)
    index = torch.tensor([1, 0])
    assert isinstance(there, Pretended) and there.device == GPU and there.cpu().tolist() == here.tolist()
    assert isinstance(torch.zeros(2, device=GPU) + 1, Pretended) and not isinstance(here + 1, Pretended)
    assert there[index].tolist() == there[[1, 0]].tolist() == [[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]
    assert (there * torch.tensor(2.0)).sum().item() == 30.0
    there[:, 1] = 7.0
    assert there.tolist() == [[0.0, 7.0, 2.0], [3.0, 7.0, 5.0]] and here[0, 1] == 1.0
    weight = torch.ones(3, 2).to(GPU).requires_grad_()
    (there @ weight).sum().backward()
    assert isinstance(weight.grad, Pretended) and weight.grad.tolist() == [[3.0, 3.0], [14.0, 14.0], [7.0, 7.0]]
    assert refused(lambda: there + here) and refused(lambda: torch.where(here > 1, there, there))
    assert refused(lambda: here[index.to(GPU)]) and refused(lambda: torch.cat([there, here]))
    assert refused(lambda: torch.tensor(1.0).add_(there.sum()))
print("rules hold")
"""
MISTAKE = """
from unittest.mock import patch
import torch
import pretend_gpu
from components.rl import functional

def last_token(mask):
    places = torch.arange(mask.shape[1])  # on the CPU
    return places == (mask.cpu() * places).argmax(dim=1, keepdim=True)

with patch.object(functional, "last_token", last_token):
    pretend_gpu.main(["ppo"])
"""


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own: the device stays for as long as a process lives."""
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_the_device_that_is_not_there_has_a_gpus_rules() -> None:
    run = started("-c", RULES)
    assert run.stdout == "rules hold\n", run.stderr[-2000:]


def test_training_mixes_no_devices() -> None:
    run = started(str(BENCHMARKS / "pretend_gpu.py"), *WORKS)
    assert run.returncode == 0, run.stderr[-3000:]
    done = [line for line in run.stdout.splitlines() if line.endswith(": one device")]
    assert done == [f"{name}: one device" for name in WORKS]


def test_a_tensor_that_stayed_on_the_cpu_is_found() -> None:
    run = started("-c", MISTAKE)
    assert run.returncode == 1
    assert "of the CPU among those of the GPU" in run.stderr and "in token_rewards" in run.stderr
