"""APOLLO: 2412.05270, algorithm 1, in the order of operations of the authors' implementation."""

import torch

from lowmem_kernels.projection import ApolloRule
from lowmem_kernels.projection.rule import moment_shape, norm_shape
from lowmem_kernels.testing.oracles import apollo, apollo_mini
from lowmem_kernels.testing.oracles.multinorm import is_matrix
from lowmem_optim import APOLLO, APOLLOMini
from optim.cases import OptimizerCase
from optim.multinorm import OTHER, decay, with_ratio
from optim.multinorm import state as fallback_state


def numbered(rule):
    """The oracle, told the numbers that `make_groups` gives to parameters."""

    def told(params, grads, options):
        return rule(params, grads, options, [place_in_groups(i, len(params)) for i in range(len(params))])

    return with_ratio(told)


def place_in_groups(i, count):
    """The position of a parameter among all, of which `make_groups` puts those at even places first."""
    return i // 2 if i % 2 == 0 else (count + 1) // 2 + i // 2


def state(stacks=None, dtype=torch.float32, **options):
    """A case's `state`."""
    rule = ApolloRule(**options, conv=stacks == "conv")

    def of(shape, param_dtype):
        if not is_matrix(shape, stacks):
            return fallback_state("adamw")(shape, param_dtype)
        kind = dtype or param_dtype
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), (moment_shape(shape, rule), kind))
        return moments | {"update_norm": (norm_shape(shape, rule), torch.float32), "epoch": ((), torch.float32)}

    return of


WRONG = [
    ("scale", -1.0),
    ("scale", float("nan")),
    ("update_proj_gap", 0),
    ("update_proj_gap", 2.5),
    ("proj_type", "full"),
    ("betas", (0.9,)),
    ("betas", (0.9, 1.0)),
    ("eps", 0.0),
    ("weight_decay", -0.1),
    ("disable_nl", "yes"),
    ("state_dtype", "bf16"),
    ("source", "svd"),
    ("source", None),
]
WRONG_RANK = [("rank", 0), ("rank", 2.0), ("rank", True), ("scale_type", "row")]

CASES = [
    OptimizerCase(
        name="apollo",
        optimizer=APOLLO,
        options={"lr": 1e-2, "rank": 4, "scale": 2.0, "update_proj_gap": 7, "weight_decay": 0.1},
        other_options={**OTHER, "scale_type": "tensor", "update_proj_gap": 20, "betas": (0.8, 0.95), "eps": 1e-3},
        oracle=numbered(apollo),
        state=state(rank=4),
        wrong=[*WRONG, *WRONG_RANK],
        elementwise=False,
        fallback_elementwise=True,
        draws=True,
        decay=decay(1.0),
    ),
    OptimizerCase(
        name="apollo-mini-batched",
        optimizer=APOLLOMini,
        options={"lr": 1e-2, "update_proj_gap": 9, "weight_decay": 0.1, "stacks": "batched"},
        other_options={**OTHER, "scale": 16.0, "proj_type": "reverse_std", "disable_nl": True},
        oracle=numbered(apollo_mini),
        state=state(stacks="batched", rank=1),
        wrong=WRONG,
        elementwise=False,
        fallback_elementwise=True,
        draws=True,
        decay=decay(1.0, "batched"),
    ),
    OptimizerCase(
        name="apollo-conv-state_as_param",
        optimizer=APOLLO,
        options={"lr": 1e-2, "rank": 8, "source": "rademacher", "stacks": "conv", "state_dtype": "param"},
        other_options={**OTHER, "source": "torch"},
        oracle=numbered(apollo),
        state=state(stacks="conv", dtype=None, rank=8),
        wrong=[],
        elementwise=False,
        fallback_elementwise=True,
        draws=True,
        refuses_float16=True,
        decay=decay(1.0, "conv"),
    ),
]
