"""AdaPM: partial momentum for all matrices, here by policy; what names say is in test_adapm.py."""

import numpy as np
import torch

import lowrank_oracle as exact
from lowmem_optim import AdaPM
from lowmem_optim.partial import _starting_rows
from optim.cases import OptimizerCase

DEFAULTS = {
    "second_moment": "adam",
    "update_clip": ("elem", 3.0),
    "solver": "power",
    "refresh": 50,
    "residual_scale": 1.0,
}


def oracle(params, grads, options):
    """Every matrix of a parameter by itself; where momentum starts looking is a random choice, and taken as it is."""
    ends, states = [], []
    for i, p in enumerate(params):
        o = {**DEFAULTS, **options[0][i]}
        low = p.ndim in (2, 3) and p.size > 0
        factored = o["second_moment"] == "factored" and p.ndim >= 2
        v = (np.zeros(p.shape[:-1]), np.zeros((*p.shape[:-2], *p.shape[-1:]))) if factored else 0 * p
        stack = p.reshape(-1, *p.shape[-2:]) if low else p
        rank = min(o["rank"], *p.shape[-2:]) if low else 0
        factors = []
        if low:
            start = np.zeros((p.shape[-2], rank)), _starting_rows(rank, p.shape[-1]).double().numpy()
            factors = [start] * len(stack)
        m = 0 * p
        for t in range(1, len(grads) + 1):
            o = {**DEFAULTS, **options[t - 1][i]}
            beta1, beta2 = o["betas"]
            g = grads[t - 1][i]
            if low:
                rule = (o["residual_scale"], o["solver"], o["refresh"])
                pairs = zip(factors, g.reshape(stack.shape), strict=True)
                found = [exact.momentum_of(*each, x, t, beta1, *rule) for each, x in pairs]
                u = np.stack([each[0] for each in found]).reshape(p.shape)
                factors = [each[1:] for each in found]
            else:
                m = beta1 * m + (1 - beta1) * g
                u = m / (1 - beta1**t)
            v, spread = exact.second_moment(v, g, beta2, "factored" if factored else "element")
            x = exact.clipped(exact.normalized(u, spread, t, beta2, o["eps"]), o["update_clip"])
            p = p - o["lr"] * (x + o["weight_decay"] * p)
        ends.append(p)
        moments = {"exp_avg_sq_row": v[0], "exp_avg_sq_col": v[1]} if factored else {"exp_avg_sq": v}
        # factors are compared by what they make of the parameter
        states.append(moments if p.ndim in (2, 3) else {**moments, "exp_avg": m})
    return ends, states


def state(rank):
    def of(shape, dtype):
        low = len(shape) in (2, 3) and 0 not in shape
        r = min(rank, *shape[-2:]) if low else 0
        momentum = (
            {"exp_avg_left": (*shape[:-1], r), "exp_avg_right": (*shape[:-2], r, shape[-1])}
            if low
            else {}
            if len(shape) in (2, 3)
            else {"exp_avg": shape}
        )
        return {key: (each, torch.float32) for key, each in {**momentum, "exp_avg_sq": shape}.items()}

    return of


CASES = [
    OptimizerCase(
        name="adapm",
        optimizer=AdaPM,
        options={
            "lr": 1e-2,
            "rank": 4,
            "betas": (0.9, 0.99),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "policy": "lowrank",
        },
        other_options={"lr": 3e-3, "rank": 2, "betas": (0.8, 0.95), "eps": 1e-3, "residual_scale": 0.5, "solver": "gd"},
        oracle=oracle,
        state=state(4),
        wrong=[
            ("rank", -1),
            ("rank", 65),
            ("rank", 4.0),
            ("rank", True),
            ("second_moment", "adafactor"),
            ("solver", "svd"),
            ("refresh", 0),
            ("residual_scale", 1.5),
            ("residual_scale", -0.1),
            ("residual_scale", "1"),
            ("update_clip", 1.0),
            ("update_clip", ("rms", 0.0)),
            ("update_clip", ("norm", 1.0)),
            ("policy", "low"),
            ("head_dim", 0),
            ("betas", (0.9, 1.0)),
            ("eps", 0.0),
            ("weight_decay", -0.1),
        ],
        elementwise=False,
        fallback_elementwise=True,
    ),
]
