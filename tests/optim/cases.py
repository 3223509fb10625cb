"""What a file opt_<name>.py says about an optimizer, so that every module of this folder tests it."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

import lowmem_optim
from lowmem_optim.base import LowMemOptimizer
from optim.tensors import LAYOUTS

Options = Mapping[str, Any]

#: (parameters at the start, gradients[step][parameter], options[step][parameter]) -> (parameters, states) at the end.
#: Everything is float64; a state is {key: array}.
Oracle = Callable[
    [Sequence[np.ndarray], Sequence[Sequence[np.ndarray]], Sequence[Sequence[Options]]],
    tuple[Sequence[np.ndarray], Sequence[dict[str, np.ndarray]]],
]


@dataclass(frozen=True)
class Peer:
    """An implementation by others that has to end at the same parameters.

    make: groups of parameters and options -> the peer's optimizer.
    dtype: of parameters and gradients; float32 is compared at parity_tolerance.
    options: what ours is given on top of the case's options.
    before_step: called with all parameters before each of the peer's steps.
    layouts: of the parameters that it can handle.
    unknown: options that only ours has.
    mismatches, state_mismatches: for bfloat16, the fraction of elements that may be rounded to the other neighbour.
    """

    name: str
    make: Callable[[list[dict[str, Any]]], Optimizer]
    dtype: torch.dtype = torch.float32
    options: Options = field(default_factory=dict)
    before_step: Callable[[list[Tensor]], object] = lambda params: None
    layouts: Sequence[str] = tuple(LAYOUTS)
    unknown: frozenset[str] = frozenset()
    mismatches: float = 0.0
    state_mismatches: float = 0.0


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer with one choice of options.

    name: in test ids.
    optimizer: the class.
    options: constructor arguments, lr included; an lr of None for a rule that makes its own.
    other_options: what a second group sets differently.
    oracle: the rule in float64 NumPy, written from the paper.
    state: (shape, dtype) of a parameter -> {key: (shape, dtype)} of its state, apart from step and uid.
    wrong: (argument, value) pairs that the constructor refuses, on top of those that every optimizer refuses.
    peers: implementations by others.
    couples_parameters: one gradient changes the update of all parameters, and a bad one stops it.
    bounds_elements: gradient elements are clamped, so that an Inf that is not skipped acts like a large number.
    refuses_float16: with these options, float16 parameters are a TypeError.
    elementwise: where parameters are not coupled, a bad gradient element stops its own update only, not the tensor's.
    fallback_elementwise: the same for parameters that are no matrices, where those get another rule; None: they do not.
    rowwise: a bad element of a matrix stops the update of its row.
    centres_rows: rows of a matrix's update have mean zero.
    draws: updates depend on random numbers, and so on the seed, whatever the rounding.
    decay: (parameter, lr) -> what weight_decay is multiplied by.
    """

    name: str
    optimizer: type[LowMemOptimizer]
    options: Options
    other_options: Options
    oracle: Oracle
    state: Callable[[tuple[int, ...], torch.dtype], dict[str, tuple[tuple[int, ...], torch.dtype]]]
    wrong: Sequence[tuple[str, Any]]
    peers: Sequence[Peer] = field(default=())
    couples_parameters: bool = False
    bounds_elements: bool = False
    refuses_float16: bool = False
    elementwise: bool = True
    fallback_elementwise: bool | None = None
    rowwise: bool = False
    centres_rows: bool = False
    draws: bool = False
    decay: Callable[[np.ndarray, float], float] = lambda param, lr: lr

    def state_keys(self, param: Tensor) -> list[str]:
        """The keys of a parameter's state, apart from step and uid."""
        return list(self.state(tuple(param.shape), param.dtype))

    def keeps_elements(self, param: Tensor) -> bool:
        """Whether a bad gradient element stops its own update only, of a parameter of at most two dimensions."""
        own = param.ndim == 2 or self.fallback_elementwise is None
        return self.elementwise if own else bool(self.fallback_elementwise)

    def make(self, params: Any, **overrides: Any) -> LowMemOptimizer:
        """The optimizer over parameters, named parameters or groups."""
        return self.optimizer(params, **{**self.options, **overrides})

    def make_groups(self, params: Sequence[Any], **overrides: Any) -> LowMemOptimizer:
        """The optimizer over two groups: parameters at even positions, and those at odd ones with other options."""
        groups = [{"params": params[::2]}, {"params": params[1::2], **self.other_options, **overrides}]
        return self.make(groups, **overrides)

    def options_at(self, position: int) -> dict[str, Any]:
        """The options that `make_groups` gives to the parameter at a position."""
        return {**self.options, **(self.other_options if position % 2 else {})}


def exported() -> dict[str, type[LowMemOptimizer]]:
    """The optimizers of the package, by name."""
    items = {name: getattr(lowmem_optim, name) for name in lowmem_optim.__all__}
    return {k: v for k, v in items.items() if isinstance(v, type) and issubclass(v, LowMemOptimizer)}


def discover() -> list[OptimizerCase]:
    """All cases of all files opt_<name>.py beside this one."""
    modules = [importlib.import_module(f"optim.{path.stem}") for path in sorted(Path(__file__).parent.glob("opt_*.py"))]
    return [case for module in modules for case in module.CASES]
