"""Adafactor as in transformers, with which it is compared in bfloat16 too: both round a parameter once in a step."""

import torch
import transformers

from lowmem_kernels.testing.oracles import adafactor
from lowmem_optim import Adafactor
from optim.cases import OptimizerCase, Peer
from optim.factored import WRONG_CLIP, WRONG_COMMON, WRONG_RATE, factors, scaled_by_parameter


def hf(**options):
    return lambda groups: transformers.Adafactor(groups, **options)


def bfloat16(make, **options):
    """Results that differ in the last digits of float32 round otherwise where a threshold lies in between.

    For the 50 writes that an element keeps, with differences of a few 2**-24 of what is written, that is one in 1000.
    """
    return Peer(
        "transformers-bf16",
        make,
        torch.bfloat16,
        {"stochastic_rounding": False, **options},
        unknown=frozenset({"stochastic_rounding", "state_dtype"}),
        mismatches=0.002,
    )


def with_momentum(shape, dtype):
    return {"exp_avg": (shape, dtype), **factors(shape)}


WRONG = [
    *WRONG_COMMON,
    *WRONG_CLIP,
    *WRONG_RATE,
    ("beta1", 1.0),
    ("beta1", -0.1),
    ("scale_parameter", 1),
    ("relative_step", None),
    ("warmup_init", "yes"),
    ("state_dtype", "bf16"),
]
EXTERNAL = {"relative_step": False, "scale_parameter": False}

CASES = [
    OptimizerCase(
        name="adafactor",
        optimizer=Adafactor,
        options={"lr": None, "weight_decay": 0.1},
        # eps2 is large so that the warm-up gets somewhere
        other_options={"warmup_init": True, "weight_decay": 0.02, "eps": (1e-2, 1e3), "clip_threshold": 0.6},
        oracle=adafactor,
        state=lambda shape, dtype: factors(shape),
        wrong=WRONG,
        peers=[Peer("transformers", hf()), bfloat16(hf())],
        elementwise=False,
        decay=scaled_by_parameter,
    ),
    OptimizerCase(
        name="adafactor-lr",
        optimizer=Adafactor,
        options={"lr": 1e-2, **EXTERNAL, "weight_decay": 0.1},
        other_options={"lr": 3e-3, "scale_parameter": True, "eps": (1e-2, 2.0), "decay_rate": -0.5},
        oracle=adafactor,
        state=lambda shape, dtype: factors(shape),
        wrong=[*WRONG, ("warmup_init", True)],
        peers=[Peer("transformers", hf(lr=1.0, **EXTERNAL)), bfloat16(hf(lr=1.0, **EXTERNAL))],
        elementwise=False,
    ),
    OptimizerCase(
        name="adafactor-momentum-param-state",
        optimizer=Adafactor,
        options={"lr": 5e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1, "state_dtype": "param"},
        other_options={"beta1": 0.5, "scale_parameter": False, "lr": 1e-2, "clip_threshold": 0.6},
        oracle=adafactor,
        state=with_momentum,
        wrong=WRONG,
        peers=[
            Peer("transformers", hf(lr=1.0, relative_step=False), unknown=frozenset({"state_dtype"})),
            bfloat16(hf(lr=1.0, relative_step=False), state_dtype="fp32"),
        ],
        refuses_float16=True,
        elementwise=False,
        decay=scaled_by_parameter,
    ),
]
