"""Adam-mini, 2406.16793: without names, rows of matrices, outputs of convolutions, and whole vectors."""

import torch

from lowmem_kernels.testing.oracles.lowrank import adammini, rows_of
from lowmem_optim import AdamMini
from optim.cases import OptimizerCase


def state(shape, dtype):
    return {"exp_avg": (shape, torch.float32), "exp_avg_sq_row": ((rows_of(shape),), torch.float32)}


CASES = [
    OptimizerCase(
        name="adammini",
        optimizer=AdamMini,
        options={"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
        other_options={"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0},
        oracle=adammini,
        state=state,
        wrong=[("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -0.1), ("head_dim", 0), ("head_dim", 64.0)],
        elementwise=False,
        rowwise=True,
    ),
]
