"""The GPU that torch sees, in words on one line.

    python benchmarks/device.py

Exits 2 with one message where there is none.
"""

import sys


def main() -> int:
    """0, or 2 where there is no GPU to compute on."""
    try:
        import torch
    except ImportError as error:
        print(f"torch cannot be imported ({error}); install torch, transformers and accelerate.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no CUDA GPU, and that is what is measured here. Run this on a machine "
            "with one, or try the command itself out: --device cpu --size 1m --steps 1.",
            file=sys.stderr,
        )
        return 2
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB, CUDA {torch.version.cuda}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
