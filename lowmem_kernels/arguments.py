"""What the launchers of all families pass to their kernels alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .options import GradTransform, Rounding
from .table import Layout

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def device_scalar(value: float | Tensor) -> float | Tensor:
    """A scalar on the device as it is; a number, or a tensor on the host, as a float: an int would be a new kernel."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def log_of(beta: float) -> float:
    """The logarithm of a decay rate, as `fragments.one_minus_power` takes it; finite for 0, so that 0**0 is 1."""
    return math.log(beta) if beta > 0 else -1e4


def compiler_options(num_warps: int, maxnreg: int | None, **others: int) -> dict[str, Any]:
    """Return options of Triton's compiler. ``maxnreg``: registers that a thread may have; None: as many as it wants."""
    return {"num_warps": num_warps, **others, **({} if maxnreg is None else {"maxnreg": maxnreg})}


def taken_by(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments that a kernel takes, of those that several share."""
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def update_arguments(
    params: Sequence[Tensor], grads: Sequence[Tensor], layout: Layout, transform: GradTransform, rounding: Rounding
) -> dict[str, Any]:
    """Return the arguments of every kernel that writes parameters: how g is read, what may be assumed, rounding."""
    return {
        "skipped_ptr": transform.skipped,
        "found_inf": transform.found_inf,
        "scale": -1.0 if transform.maximize else 1.0,
        "inv_scale": transform.inv_scale,
        "clip_value": None if transform.clip_value is None else float(transform.clip_value),
        "clip_coef": transform.clip_coef,
        "PARAM": TRITON_DTYPES[params[0].dtype],
        "GRAD": TRITON_DTYPES[grads[0].dtype],
        "ALIGNED": layout.aligned,
        "STRIDED": layout.strided,
        "STOCHASTIC": rounding.stochastic,
        "SKIP_NONFINITE": transform.skip_nonfinite,
        "enable_fp_fusion": False,
    }
