"""Options that every optimizer takes, and checks whose messages name the argument, its value and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from lowmem_kernels.dispatch import BACKENDS
from lowmem_kernels.numerics import PARAM_DTYPES, name_of, rounds_stochastically


class CommonOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer accepts, for all parameters or in a group.

    Attributes:
        stochastic_rounding: round bfloat16 parameters and states stochastically; None: on for bfloat16, off otherwise.
        seed: of the rounding noise, any 64-bit integer.
        maximize: follow the gradient instead of its negative.
        capturable: keep lr in a tensor on the device, so that a captured CUDA graph sees it change.
        skip_nonfinite: what a NaN or Inf in a gradient stops. "tensor": the update of the tensor it is in, or only of
            the element or row for rules that need no sum over more. "step": the whole step, at the price of one more
            read of all gradients. False: nothing.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton" or "torch".
    """

    stochastic_rounding: bool | None
    seed: int
    maximize: bool
    capturable: bool
    skip_nonfinite: str | bool
    backend: str


COMMON_DEFAULTS: CommonOptions = {
    "stochastic_rounding": None,
    "seed": 0,
    "maximize": False,
    "capturable": False,
    "skip_nonfinite": "tensor",
    "backend": "auto",
}

#: Keys that torch, its schedulers, Lightning and timm put into groups; never taken for a misspelling of an option.
FOREIGN_KEYS = {
    "params",
    "param_names",
    "name",
    "initial_lr",
    "min_lr",
    "max_lr",
    "base_momentum",
    "max_momentum",
    "lr_scale",
}


def check_names(names: Iterable[str], known: Iterable[str], *, unknown_is_error: bool) -> None:
    """Raise TypeError for a name that looks like a misspelled option, or, if so asked, for any that is unknown."""
    known = sorted(known)
    for name in names:
        if name in known or name in FOREIGN_KEYS:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near or unknown_is_error:
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}; {hint}")


def check_common(options: Mapping[str, Any]) -> None:
    """Check the values of CommonOptions."""
    check_choice("stochastic_rounding", options["stochastic_rounding"], (None, True, False))
    if not isinstance(options["seed"], int):
        raise TypeError(f"seed is {options['seed']!r}; allowed: an integer")
    check_choice("maximize", options["maximize"], (True, False))
    check_choice("capturable", options["capturable"], (True, False))
    check_choice("skip_nonfinite", options["skip_nonfinite"], ("tensor", "step", False))
    check_choice("backend", options["backend"], BACKENDS)


def check_lr(lr: Any) -> None:
    """Raise ValueError unless ``lr`` is a number >= 0 or a tensor of one."""
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
    elif lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; allowed: a number >= 0 or a 0-d tensor")


def check_param(param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for a parameter that cannot be optimized."""
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"a parameter is {name_of(param.dtype)}; allowed: {', '.join(map(name_of, PARAM_DTYPES))}")
    rounds_stochastically(param.dtype, group["stochastic_rounding"])


def check_state_dtype(param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise TypeError for a parameter whose dtype cannot be that of its state, where the group asks for that."""
    if group["state_dtype"] == "param" and param.dtype is torch.float16:
        raise TypeError("state_dtype is 'param' and a parameter is float16; allowed: bfloat16, float32")


def check_number(name: str, value: Any, *, positive: bool = False, below: float = math.inf) -> None:
    """Raise ValueError unless ``0 <= value < below``, or ``0 < value < below`` if ``positive``."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value < below or (positive and value == 0):
        limit = "" if below == math.inf else f" and < {below:g}"
        raise ValueError(f"{name} is {value!r}; allowed: a finite number {'>' if positive else '>='} 0{limit}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_integer(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")


def check_clipping(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless clip_grad_norm and clip_grad_value are None or numbers > 0."""
    for name in ("clip_grad_norm", "clip_grad_value"):
        if options[name] is not None:
            check_number(name, options[name], positive=True)


def check_betas(betas: Any, count: int, name: str = "betas") -> None:
    """Raise ValueError unless ``betas`` are ``count`` numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise ValueError(f"{name} is {betas!r}; allowed: {count} numbers >= 0 and < 1")
    for i, beta in enumerate(betas):
        check_number(f"{name}[{i}]", beta, below=1)
