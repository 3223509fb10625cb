"""LOMO: 2306.09782, with the weight decay of the package lomo-optim."""

import torch

from lowmem_kernels.testing import oracles
from lowmem_optim import Lomo
from optim.cases import OptimizerCase, Peer


def sgd(before_step):
    """torch adds weight_decay * p to the gradient and multiplies by lr, which without momentum is the same rule.

    In bfloat16 it rounds g + weight_decay * p and lr on the way, so that only float32 can be compared.
    """
    return Peer(
        "torch-sgd",
        lambda groups: torch.optim.SGD(groups, lr=0.0),
        before_step=before_step,
        unknown=frozenset({"clip_grad_norm", "clip_grad_value"}),
    )


def clip_norm(params):
    torch.nn.utils.clip_grad_norm_(params, MAX_NORM)


def clip_value(params):
    torch.nn.utils.clip_grad_value_(params, MAX_VALUE)


#: between the gradients' norms of different steps, and about their typical element: some are clipped and some are not
MAX_NORM = 25.0
MAX_VALUE = 0.7
WRONG = [
    ("clip_grad_norm", 0.0),
    ("clip_grad_norm", -1.0),
    ("clip_grad_norm", float("inf")),
    ("clip_grad_value", 0.0),
    ("clip_grad_value", -1.0),
    ("clip_grad_value", "1"),
    ("weight_decay", -0.1),
    ("weight_decay", float("nan")),
]


def lomo_case(name, clip=lambda params: None, **fields):
    """Decay differs between the groups; both read all gradients with one bound."""
    options = {"lr": 3e-2, "weight_decay": 0.0, **fields.pop("options", {})}
    return OptimizerCase(
        name=name,
        optimizer=Lomo,
        options=options,
        other_options={"lr": 1e-2, "weight_decay": 0.2},
        oracle=oracles.sgd,
        state=lambda shape, dtype: {},
        wrong=WRONG,
        peers=[sgd(clip)],
        **fields,
    )


CASES = [
    lomo_case("lomo"),
    lomo_case("lomo-decay", options={"weight_decay": 0.1}),
    lomo_case("lomo-clip-norm", clip_norm, options={"clip_grad_norm": MAX_NORM}, couples_parameters=True),
    lomo_case("lomo-clip-value", clip_value, options={"clip_grad_value": MAX_VALUE}, bounds_elements=True),
]
