"""AdaPM: partial momentum for all matrices, here by policy; what names say is in test_adapm.py."""

import torch

from lowmem_kernels.testing.oracles import adapm
from lowmem_optim import AdaPM
from lowmem_optim.partial import starting_rows
from optim.cases import OptimizerCase


def oracle(params, grads, options):
    return adapm(params, grads, options, lambda rank, columns: starting_rows(rank, columns).double().numpy())


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
