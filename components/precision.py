"""The precision that a policy is held in where it answers: one rule for evaluation, infer and serving."""


def serving_dtype() -> str:
    """bf16 on a GPU, fp32 elsewhere. What the gate decides on must be what users get."""
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"
