"""AdamW: 1711.05101, algorithm 2, with the decay multiplied by lr."""

import torch

from lowmem_kernels.testing.oracles import adamw
from lowmem_optim import AdamW
from optim.cases import OptimizerCase, Peer


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
        oracle=adamw,
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
        oracle=adamw,
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
