"""Adam-mini, 2406.16793: without names, rows of matrices, outputs of convolutions, and whole vectors."""

import numpy as np
import torch

import lowrank_oracle as exact
from lowmem_optim import AdamMini
from optim.cases import OptimizerCase


def groups(shape):
    if 0 in shape:
        return 0
    return 1 if len(shape) < 2 else shape[0] if len(shape) == 4 else int(np.prod(shape[:-1]))


def oracle(params, grads, options):
    ends, states = [], []
    for i, p in enumerate(params):
        m, v = 0 * p, np.zeros(groups(p.shape))
        for t in range(1, len(grads) + 1):
            o = options[t - 1][i]
            beta1, beta2 = o["betas"]
            g = grads[t - 1][i]
            m = beta1 * m + (1 - beta1) * g
            if g.size:
                v, spread = exact.second_moment(v, g, beta2, "rows")
                x = exact.normalized(m / (1 - beta1**t), spread, t, beta2, o["eps"])
                p = p - o["lr"] * (x + o["weight_decay"] * p)
        ends.append(p)
        states.append({"exp_avg": m, "exp_avg_sq_row": v})
    return ends, states


def state(shape, dtype):
    return {"exp_avg": (shape, torch.float32), "exp_avg_sq_row": ((groups(shape),), torch.float32)}


CASES = [
    OptimizerCase(
        name="adammini",
        optimizer=AdamMini,
        options={"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
        other_options={"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0},
        oracle=oracle,
        state=state,
        wrong=[("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -0.1), ("head_dim", 0), ("head_dim", 64.0)],
        elementwise=False,
        rowwise=True,
    ),
]
