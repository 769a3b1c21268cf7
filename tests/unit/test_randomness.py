"""Every global random state comes back as it was."""

import random

import numpy as np
import pytest
import torch

from components.randomness import random_states, set_random_states


def draws() -> list[object]:
    return [
        torch.randn(3).tolist(),
        [random.random(), random.gauss(0, 1), random.randrange(10**9)],
        [np.random.rand(), np.random.randn(), int(np.random.randint(10**9))],
    ]


@pytest.mark.parametrize("drawn", [0, 1, 2])  # an odd number of normal draws keeps one back
def test_what_is_drawn_afterwards_is_drawn_again(drawn: int) -> None:
    for _ in range(drawn):
        random.gauss(0, 1)
        np.random.randn()
    states = {name: tensor.clone() for name, tensor in random_states().items()}
    first = draws()
    assert draws() != first
    set_random_states(states)
    assert draws() == first


def test_a_state_of_a_machine_with_gpus_is_taken_back_on_one_without() -> None:
    states = random_states() | {f"random.cuda.{torch.cuda.device_count()}": torch.zeros(16, dtype=torch.uint8)}
    first = draws()
    set_random_states(states)
    assert draws() == first
