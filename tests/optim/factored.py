"""What the cases of factored rules share."""

import torch

from lowmem_kernels.testing.oracles.factored import rms


def factors(shape, prefix="exp_avg_sq"):
    """{key: (shape, dtype)} of the second moment of a parameter."""
    if len(shape) < 2:
        return {prefix: (shape, torch.float32)}
    return {
        f"{prefix}_row": (shape[:-1], torch.float32),
        f"{prefix}_col": (shape[:-2] + shape[-1:], torch.float32),
    }


def scaled_by_parameter(param, lr):
    """What weight decay is multiplied by, where it is lr RMS(p)."""
    return lr * max(1e-3, rms(param))


#: wrong values of the options that all factored rules have
WRONG_COMMON = [
    ("eps", (1e-30,)),
    ("eps", (-1e-30, 1e-3)),
    ("eps", (1e-30, float("nan"))),
    ("eps", 1e-30),
    ("eps", (1e-30, None)),
    ("weight_decay", -0.1),
    ("weight_decay", float("inf")),
]
WRONG_CLIP = [("clip_threshold", 0.0), ("clip_threshold", -1.0), ("clip_threshold", None)]
WRONG_RATE = [("decay_rate", 0.8), ("decay_rate", float("-inf")), ("decay_rate", None), ("decay_rate", True)]
