"""CAME: 2307.02047, algorithm 2, with the package's rule for vectors."""

import numpy as np
import torch
from came_pytorch import CAME as Package

from lowmem_optim import CAME
from optim.cases import OptimizerCase, Peer
from optim.factored import WRONG_CLIP, WRONG_COMMON, SecondMoment, clipped, factors


def oracle(params, grads, options):
    params = list(params)
    m = [0 * p for p in params]
    moments, instabilities = ([SecondMoment(p.shape) for p in params] for _ in range(2))
    for gs, os in zip(grads, options, strict=True):
        for i, (g, o) in enumerate(zip(gs, os, strict=True)):
            o = {"eps": (1e-30, 1e-16), "clip_threshold": 1.0, "weight_decay": 0.0, **o}
            beta1, beta2, beta3 = o["betas"]
            moments[i].move(g**2 + o["eps"][0], 1 - beta2)
            u = clipped(g / np.sqrt(moments[i].estimate()), o["clip_threshold"])
            m[i] = beta1 * m[i] + (1 - beta1) * u
            update = m[i]
            if g.ndim >= 2:
                instabilities[i].move((u - m[i]) ** 2 + o["eps"][1], 1 - beta3)
                update = m[i] / np.sqrt(instabilities[i].estimate())
            params[i] = params[i] - o["lr"] * (update + o["weight_decay"] * params[i])
    states = zip(m, moments, instabilities, strict=True)
    return params, [
        {"exp_avg": a, **b.state(), **(c.state("exp_avg_res") if a.ndim >= 2 else {})} for a, b, c in states
    ]


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
        oracle=oracle,
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
