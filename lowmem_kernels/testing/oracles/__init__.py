"""The optimizers' rules in float64 NumPy, written from the papers: what is right.

No reference and no kernel is used, but for APOLLO's projections, which are random numbers and taken as they are.

``rule(params, grads, options)`` takes parameters at the start, gradients[step][parameter] and options[step][parameter],
and returns the parameters and the states at the end, a state being ``{key: array}``. Options are those of the
constructors of `lowmem_optim`, and the defaults theirs. Used by the tests and by `lowmem doctor`.
"""

from .elementwise import adam, adamw, sgd
from .factored import adafactor, adalomo, came, torch_adafactor
from .lowrank import adammini, adapm
from .multinorm import mngd, sinkgd, swan
from .projection import apollo, apollo_mini
from .types import Oracle

__all__ = [
    "Oracle",
    "adafactor",
    "adalomo",
    "adam",
    "adammini",
    "adamw",
    "adapm",
    "apollo",
    "apollo_mini",
    "came",
    "mngd",
    "sgd",
    "sinkgd",
    "swan",
    "torch_adafactor",
]
