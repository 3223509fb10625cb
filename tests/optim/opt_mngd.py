"""MNGD: 2502.06742, algorithms 1 and 2, with other norms than SinkGD's and a momentum of what is normalized."""

from lowmem_kernels.testing.oracles import mngd
from lowmem_optim import MNGD
from optim.cases import OptimizerCase
from optim.multinorm import OTHER, WRONG, WRONG_SOLVER, decay, state, with_ratio

WRONG_NORMS = [
    ("norms", ()),
    ("norms", "row"),
    ("norms", ("row", "column")),
    ("norms", ("row", "spectre")),
    ("norms", ("row", None)),
    ("norms", None),
]
WRONG_ITERATIONS = [("solver_iterations", 0), ("solver_iterations", 2.0), ("solver_iterations", True)]

CASES = [
    OptimizerCase(
        name="mngd",
        optimizer=MNGD,
        options={
            "lr": 2e-2,
            "norms": ("col", "row", "frobenius"),
            "iterations": 2,
            "scale": 0.5,
            "weight_decay": 0.1,
            "momentum": 0.8,
            "momentum_after": True,
        },
        other_options={**OTHER, "norms": ("frobenius",), "momentum": 0.5, "nesterov": True},
        oracle=with_ratio(mngd),
        state=state("adamw", momentum="fp32"),
        wrong=[*WRONG, *WRONG_NORMS, *WRONG_SOLVER, *WRONG_ITERATIONS],
        elementwise=False,
        fallback_elementwise=True,
        decay=decay(0.5),
    ),
    OptimizerCase(
        name="mngd-spectral",
        optimizer=MNGD,
        options={
            "lr": 2e-2,
            "norms": ("spectral", "row"),
            "iterations": 1,
            "scale": 0.5,
            "weight_decay": 0.1,
            "stacks": "batched",
        },
        other_options={**OTHER, "norms": ("row", "col", "spectral"), "iterations": 2},
        oracle=with_ratio(mngd),
        state=state("adamw", stacks="batched"),
        wrong=WRONG_NORMS,
        elementwise=False,
        fallback_elementwise=True,
        decay=decay(0.5, "batched"),
    ),
]
