"""The specializations of the kernels of partial momentum that are compiled and inspected without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..lowrank import kernels
from ..lowrank.checks import Form
from ..lowrank.launch import MOMENT_BLOCK, PROBLEM_BLOCK, PROBLEM_WARPS, keeps, plan_momentum
from ..lowrank.rule import MomentumRule
from ..lowrank.schedule import LEAST_RANK, Kind
from .aot import CompileCase
from .case_parts import LAYOUTS, TYPES, case_of

_FLOATS = (
    "left_ptr", "right_ptr", "small_ptr", "row_sums_ptr", "col_sums_ptr", "mean_ptr", "partial_ptr", "clip_ptr",
    "found_inf", "inv_scale", "clip_coef",
)  # fmt: skip
_NUMBERS = (
    "lr", "weight_decay", "eps", "one_minus_beta1", "one_minus_beta2", "log_beta1", "log_beta2", "beta1", "carry",
    "gamma", "damping", "pull", "scale", "clip_rms",
)  # fmt: skip
_SIGNATURE: dict[str, str | None] = {
    "table_ptr": "*i64", "addresses_ptr": "*i64", "skipped_ptr": "*i64", "bad_ptr": "*i32", "counter_ptr": "*i32",
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(("matrices", "row_blocks", "every"), "i32"),
    **dict.fromkeys(_NUMBERS, "fp32"),
    "clip_value": None, "clip_element": None,
}  # fmt: skip


def lowrank_cases(warp_size: int) -> Iterator[CompileCase]:
    """Return specializations of the kernels that walk over gradients: forms of the moments, dtypes, layouts."""
    kernel = kernels._momentum_update_kernel
    low = Form("lowrank", "element")
    for layout, rank in (("aligned", 16), ("aligned", 64), ("strided", 16)):
        kind = Kind(LAYOUTS[layout], False, rank)
        name = f"bf16-{layout}-{rank}"
        if name == "bf16-aligned-16":
            yield _case(f"row_pass-{name}", kernels._row_pass_kernel, "bf16", kind, low, warp_size)
            yield _case(f"col_pass-{name}", kernels._col_pass_kernel, "bf16", kind, low, warp_size)
        yield _case(f"momentum_update-{name}", kernel, "bf16", kind, low, warp_size)
    for layout, momentum, second in (
        ("aligned", "none", "element"),
        ("aligned", "full", "rows"),
        ("strided", "full", "rows"),
    ):
        kind = Kind(LAYOUTS[layout], second == "rows", 0)
        name = f"momentum_update-bf16-{layout}-{momentum}-{second}"
        yield _case(name, kernel, "bf16", kind, Form(momentum, second), warp_size)


def problem_cases(warp_size: int) -> Iterator[CompileCase]:
    """Return the kernels between the passes, which have no loop over a tile of a gradient to report."""
    form = Form("lowrank", "factored")
    for kernel, rank in (
        (kernels._left_problem_kernel, LEAST_RANK),
        (kernels._right_problem_kernel, 64),
        (kernels._exchange_kernel, LEAST_RANK),
        (kernels._group_moments_kernel, LEAST_RANK),
    ):
        name = f"{kernel.__name__.strip('_').removesuffix('_kernel')}-{rank}"
        yield _case(name, kernel, "fp32", Kind(LAYOUTS["aligned"], False, rank), form, warp_size)


def _case(name: str, kernel: Any, dtype: str, kind: Kind, form: Form, warp_size: int) -> CompileCase:
    plan = plan_momentum(kind, warp_size)
    problem = kernel in (kernels._left_problem_kernel, kernels._right_problem_kernel)
    rule = MomentumRule(update_clip=("rms", 1.0) if kind.rank else None)
    signature = {**_SIGNATURE, "clip_rms": "fp32" if kind.rank else None}
    constexprs = {
        "PARAM": TYPES[dtype], "GRAD": TYPES[dtype], "ALIGNED": kind.layout.aligned,
        "STRIDED": kind.layout.strided, "STOCHASTIC": dtype == "bf16", "SKIP_NONFINITE": True,
        "LOWRANK": kind.rank > 0, "SUMS": form.second == "factored", "MOMENTUM": form.momentum,
        "SECOND": form.second, "RESIDENT": kind.resident, "KEEP": keeps(form, kind, rule), "WRITE": True,
        "PRECISION": plan.precision, "RANK": kind.rank or LEAST_RANK, "SPAN": plan.span, "BLOCK": MOMENT_BLOCK,
        "BLOCK_M": PROBLEM_BLOCK if problem else plan.block_m, "BLOCK_N": PROBLEM_BLOCK if problem else plan.block_n,
    }  # fmt: skip
    options = {"num_warps": PROBLEM_WARPS if problem else plan.num_warps, "num_stages": plan.num_stages}
    return case_of(name, kernel, signature, constexprs, options)
