"""Triton kernels of the lowrank family. README.md beside this folder has the picture and the bytes."""

from .apply import _group_moments_kernel, _momentum_update_kernel
from .factors import (
    _col_pass_kernel,
    _exchange_kernel,
    _left_problem_kernel,
    _right_problem_kernel,
    _row_pass_kernel,
)

__all__ = [
    "_col_pass_kernel",
    "_exchange_kernel",
    "_group_moments_kernel",
    "_left_problem_kernel",
    "_momentum_update_kernel",
    "_right_problem_kernel",
    "_row_pass_kernel",
]
