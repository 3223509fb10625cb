"""CAME: 2307.02047, algorithm 2, with the package's rule for vectors."""

import torch
from came_pytorch import CAME as Package

from lowmem_kernels.testing.oracles import came
from lowmem_optim import CAME
from optim.cases import OptimizerCase, Peer
from optim.factored import WRONG_CLIP, WRONG_COMMON, factors


def state(shape, dtype):
    residual = factors(shape, "exp_avg_res") if len(shape) >= 2 else {}
    return {"exp_avg": (shape, torch.float32), **factors(shape), **residual}


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "weight_decay": 0.1}
OTHER_OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.95, 0.9), "eps": (1e-2, 1e-3), "clip_threshold": 0.6, "weight_decay": 0.0}
WRONG = [
    *WRONG_COMMON,
    *WRONG_CLIP,
    ("eps", (1e-30, 0.0)),
    ("betas", (0.9, 0.99)),
    ("betas", (0.9, 0.99, 1.0)),
    ("betas", (0.9, -0.1, 0.9)),
    ("betas", 0.9),
    ("state_dtype", "bf16"),
]

CASES = [
    OptimizerCase(
        name="came",
        optimizer=CAME,
        options=OPTIONS,
        other_options=OTHER_OPTIONS,
        oracle=came,
        state=state,
        wrong=WRONG,
        peers=[
            Peer("came-pytorch", lambda groups: Package(groups, lr=1.0)),
            # decay is a rounding of its own there, so it is left out; see opt_adafactor.py for the rest
            Peer(
                "came-pytorch-bf16",
                lambda groups: Package(groups, lr=1.0),
                torch.bfloat16,
                {"stochastic_rounding": False, "weight_decay": 0.0},
                unknown=frozenset({"stochastic_rounding"}),
                mismatches=0.002,
            ),
        ],
        elementwise=False,
    )
]
