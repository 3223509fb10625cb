"""SWAN: 2412.13148, algorithms 1 and 2, with beta = 0.5: with 0.8 the iteration makes errors of 1e-3 of rounding."""

from lowmem_kernels.testing.oracles import swan
from lowmem_optim import SWAN
from optim.cases import OptimizerCase
from optim.multinorm import OTHER, WRONG_SOLVER, decay, state, with_ratio

WRONG = [
    *WRONG_SOLVER,
    ("iterations", 0),
    ("iterations", 2.0),
    ("iterations", True),
    ("scale", -0.1),
    ("scale", float("inf")),
    ("weight_decay", -0.1),
    ("weight_decay", None),
    ("center", "yes"),
    ("center", None),
]

# stacks="batched" is in a case of MNGD, which calls the same verb
CASES = [
    OptimizerCase(
        name="swan",
        optimizer=SWAN,
        options={"lr": 2e-2, "beta": 0.5, "scale": 0.5, "weight_decay": 0.1},
        other_options={**OTHER, "iterations": 6, "center": False, "scale": 2.0, "fallback_betas": (0.8, 0.95)},
        oracle=with_ratio(swan),
        state=state("adamw"),
        wrong=WRONG,
        elementwise=False,
        fallback_elementwise=True,
        centres_rows=True,
        decay=decay(0.5),
    ),
    OptimizerCase(
        name="swan-conv-adafactor",
        optimizer=SWAN,
        options={
            "lr": 1e-2,
            "iterations": 8,
            "beta": 0.5,
            "scale": 1.0,
            "weight_decay": 0.1,
            "stacks": "conv",
            "fallback": "adafactor",
        },
        other_options={**OTHER, "weight_decay": 0.0},
        oracle=with_ratio(swan),
        state=state("adafactor", stacks="conv"),
        wrong=WRONG,
        elementwise=False,
        fallback_elementwise=False,
        centres_rows=True,
        decay=decay(1.0, "conv"),
    ),
]
