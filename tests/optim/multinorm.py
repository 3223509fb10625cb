"""What the cases of multi-normalizing rules and of others with fallbacks share."""

import torch

from lowmem_kernels.testing.oracles.multinorm import is_matrix
from optim.factored import factors

#: options of a second group; an oracle is not told at which lr it has this fallback_lr
OTHER = {"lr": 3e-3, "fallback_lr": 6e-3}


def with_ratio(oracle):
    """The oracle, told what fallback_lr is in units of lr in the second group, where there is one."""

    def ratio(o):
        return {"fallback_ratio": OTHER["fallback_lr"] / OTHER["lr"]} if o.get("fallback_lr") is not None else {}

    def told(params, grads, options):
        return oracle(params, grads, [[{**o, **ratio(o)} for o in os] for os in options])

    return told


def state(fallback, momentum=None, stacks=None):
    """A case's `state`; ``momentum`` is "fp32" or "param" where there is one."""

    def of(shape, dtype):
        if is_matrix(shape, stacks):
            return {"exp_avg": (shape, torch.float32 if momentum == "fp32" else dtype)} if momentum else {}
        if fallback == "adafactor":
            return factors(shape)
        keys = ("exp_avg", "exp_avg_sq") if fallback == "adamw" else ("exp_avg",)
        return dict.fromkeys(keys, (shape, torch.float32))

    return of


def decay(scale, stacks=None):
    """A case's `decay`: each rule multiplies weight decay by its own rate."""
    return lambda param, lr: lr if is_matrix(param.shape, stacks) else lr * scale


WRONG = [
    ("iterations", 0),
    ("iterations", 2.0),
    ("iterations", True),
    ("scale", -0.1),
    ("scale", float("inf")),
    ("weight_decay", -0.1),
    ("weight_decay", None),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("nesterov", "yes"),
    ("momentum_after", 1),
    ("eps", 0.0),
    ("eps", "1e-8"),
    ("state_dtype", "bf16"),
]

WRONG_SOLVER = [
    ("solver", "svd"),
    ("solver", None),
    ("beta", 0.0),
    ("beta", 1.5),
    ("beta", float("nan")),
    ("beta", "0.5"),
]
