"""Every global random state of this process as tensors: torch's, one per GPU, Python's and numpy's.

What draws from a generator of its own keeps that generator's state itself.
"""

import random
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

TORCH, CUDA = "random.torch", "random.cuda."
PYTHON, PYTHON_GAUSS = "random.python", "random.python_gauss"
NUMPY, NUMPY_GAUSS = "random.numpy", "random.numpy_gauss"


def random_states() -> dict[str, Tensor]:
    """The states by name, all of them starting in "random."; numpy's where something has imported it."""
    _, integers, gauss = random.getstate()
    states = {
        TORCH: torch.get_rng_state(),
        PYTHON: torch.tensor(integers, dtype=torch.int64),
        PYTHON_GAUSS: torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"{CUDA}{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    if "numpy" in sys.modules:
        import numpy as np

        stated = np.random.get_state(legacy=False)
        integers = [*stated["state"]["key"].tolist(), stated["state"]["pos"], stated["has_gauss"]]
        states[NUMPY] = torch.tensor(integers, dtype=torch.int64)
        states[NUMPY_GAUSS] = torch.tensor([stated["gauss"]], dtype=torch.float64)
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Take back what `random_states` gave; of GPUs, those that this process has."""
    torch.set_rng_state(states[TORCH])
    for number in range(torch.cuda.device_count()):
        if f"{CUDA}{number}" in states:
            torch.cuda.set_rng_state(states[f"{CUDA}{number}"], number)
    version = random.getstate()[0]
    gauss = states[PYTHON_GAUSS].tolist()
    random.setstate((version, tuple(states[PYTHON].tolist()), gauss[0] if gauss else None))
    if NUMPY in states:
        import numpy as np

        *key, position, has_gauss = states[NUMPY].tolist()
        mersenne = {"key": np.array(key, dtype=np.uint32), "pos": position}
        stated = {"bit_generator": "MT19937", "state": mersenne, "has_gauss": has_gauss}
        np.random.set_state(stated | {"gauss": float(states[NUMPY_GAUSS])})
