"""AdamW: 1711.05101, algorithm 2, with the decay multiplied by lr."""

import numpy as np
import torch

from lowmem_optim import AdamW
from optim.cases import OptimizerCase, Peer


def oracle(params, grads, options):
    params = list(params)
    m, v = [0 * p for p in params], [0 * p for p in params]
    for t in range(1, len(grads) + 1):
        for i, (g, o) in enumerate(zip(grads[t - 1], options[t - 1], strict=True)):
            beta1, beta2 = o["betas"]
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat, v_hat = m[i] / (1 - beta1**t), v[i] / (1 - beta2**t)
            params[i] = params[i] - o["lr"] * (m_hat / (np.sqrt(v_hat) + o["eps"]) + o["weight_decay"] * params[i])
    return params, [{"exp_avg": a, "exp_avg_sq": b} for a, b in zip(m, v, strict=True)]


def moments(dtype_of_state):
    def state(shape, dtype):
        return {key: (shape, dtype_of_state or dtype) for key in ("exp_avg", "exp_avg_sq")}

    return state


def torch_adamw(**options):
    return lambda groups: torch.optim.AdamW(groups, **options)


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
OTHER_OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0}
WRONG = [
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9,)),
    ("betas", (0.9, 0.99, 0.999)),
    ("betas", 0.9),
    ("eps", -1e-8),
    ("eps", 0.0),
    ("eps", float("nan")),
    ("weight_decay", -0.1),
    ("weight_decay", float("inf")),
    ("state_dtype", "bf16"),
    ("state_dtype", torch.bfloat16),
]

CASES = [
    OptimizerCase(
        name="adamw",
        optimizer=AdamW,
        options=OPTIONS,
        other_options=OTHER_OPTIONS,
        oracle=oracle,
        state=moments(torch.float32),
        wrong=WRONG,
        peers=[
            Peer("torch-loop", torch_adamw(foreach=False)),
            Peer("torch-fused", torch_adamw(fused=True)),
        ],
    ),
    OptimizerCase(
        name="adamw-param-state",
        optimizer=AdamW,
        options={**OPTIONS, "state_dtype": "param"},
        other_options=OTHER_OPTIONS,
        oracle=oracle,
        state=moments(None),
        refuses_float16=True,
        wrong=WRONG,
        peers=[
            # torch writes v as b2 v + (1 - b2) g² and we as v + (1 - b2)(g² - v): one in 400 is rounded otherwise
            Peer(
                "torch-fused-bf16",
                torch_adamw(fused=True),
                torch.bfloat16,
                {"stochastic_rounding": False},
                unknown=frozenset({"state_dtype", "stochastic_rounding"}),
                mismatches=0.002,
                state_mismatches=0.01,
            ),
        ],
    ),
]
