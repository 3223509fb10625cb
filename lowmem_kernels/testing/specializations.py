"""The specializations of every kernel that are compiled and inspected without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..elementwise import kernels as elementwise
from ..elementwise.launch import STATS_PROGRAMS, plan_elementwise
from ..table import Layout
from .aot import CompileCase
from .case_parts import LAYOUTS, TYPES, case_of
from .factored_specializations import factored_cases
from .lowrank_specializations import lowrank_cases
from .multinorm_specializations import multinorm_cases
from .projection_specializations import projection_cases
from .whitening_specializations import whitening_cases

_LONG_TILE = 16384
_TABLE = {"table_ptr": "*i64", "counter_ptr": "*i32", "rows": "i32"}
_TRANSFORM = {"scale": "fp32", "inv_scale": "*fp32", "clip_coef": "*fp32", "found_inf": "*fp32", "skipped_ptr": "*i64"}


def compile_cases(warp_size: int = 32) -> list[CompileCase]:
    """Return a representative specialization of every kernel for each dtype, layout and set of optional arguments.

    ``warp_size`` is the target's (64 on gfx942), since plans depend on it.
    """
    elementwise_cases = [*_adamw_cases(), *_scaled_update_cases(), *_grad_stats_cases()]
    return [
        *(_planned(case, warp_size) for case in elementwise_cases),
        *factored_cases(warp_size),
        *multinorm_cases(warp_size),
        *projection_cases(warp_size),
        *whitening_cases(warp_size),
        *lowrank_cases(warp_size),
    ]


def _adamw_cases() -> Iterator[CompileCase]:
    hyper = ("lr", "one_minus_beta1", "one_minus_beta2", "log_beta1", "log_beta2", "eps", "weight_decay")
    signature = {**_TABLE, **_TRANSFORM, **dict.fromkeys(hyper, "fp32")}
    for param, state, layout, stochastic in (
        ("bf16", "fp32", "aligned", True),
        ("bf16", "fp32", "aligned", False),
        ("bf16", "bf16", "aligned", True),
        ("fp16", "fp32", "aligned", False),
        ("fp32", "fp32", "aligned", False),
        ("bf16", "fp32", "misaligned", True),
        ("bf16", "fp32", "strided", True),
        ("fp32", "fp32", "strided", False),
    ):
        flags = {"STATE": TYPES[state], "STOCHASTIC": stochastic, "clip_value": None}
        name = f"adamw-{param}-state_{state}-{layout}-{'stochastic' if stochastic else 'nearest'}"
        yield _case(name, elementwise._adamw_kernel, signature, param, layout, flags)
    for name, digits in (("range", 1), ("pieces", 2)):
        flags = {"STATE": TYPES["fp32"], "STOCHASTIC": True, "DIGITS": digits, "clip_value": None}
        name = f"adamw-bf16-state_fp32-{name}_of_whole"
        yield _case(name, elementwise._adamw_kernel, signature, "bf16", "aligned", flags)


def _scaled_update_cases() -> Iterator[CompileCase]:
    signature = {**_TABLE, **_TRANSFORM, "lr": "fp32", "weight_decay": "fp32"}
    for param, layout, stochastic in (
        ("bf16", "aligned", True),
        ("bf16", "aligned", False),
        ("fp16", "aligned", False),
        ("fp32", "aligned", False),
        ("bf16", "misaligned", True),
        ("bf16", "strided", True),
    ):
        name = f"scaled_update-{param}-{layout}-{'stochastic' if stochastic else 'nearest'}"
        flags = {"STOCHASTIC": stochastic, "clip_value": None}
        yield _case(name, elementwise._scaled_update_kernel, signature, param, layout, flags)
    for name, digits in (("range", 1), ("pieces", 2)):
        shard = {"STOCHASTIC": True, "DIGITS": digits, "clip_value": None}
        name = f"scaled_update-bf16-{name}_of_whole"
        yield _case(name, elementwise._scaled_update_kernel, signature, "bf16", "aligned", shard)
    # lr on the device, clipping by value, nothing optional left out or nothing given
    everything = {**signature, "lr": "*fp32", "clip_value": "fp32"}
    yield _case(
        "scaled_update-bf16-all_options", elementwise._scaled_update_kernel, everything, "bf16", "aligned",
        {"STOCHASTIC": True},
    )  # fmt: skip
    absent = dict.fromkeys((*_TRANSFORM, "clip_value"))
    del absent["scale"]
    bare = {name: kind for name, kind in signature.items() if name not in absent}
    yield _case(
        "scaled_update-bf16-no_options", elementwise._scaled_update_kernel, bare, "bf16", "aligned",
        {"STOCHASTIC": True, **absent},
    )  # fmt: skip


def _grad_stats_cases() -> Iterator[CompileCase]:
    signature = {**_TABLE, "partial_ptr": "*fp32", "out_ptr": "*fp32", "tiles": "i32"}
    for grad, layout in (("bf16", "aligned"), ("fp32", "aligned"), ("bf16", "misaligned"), ("bf16", "strided")):
        flags = {"PROGRAMS": STATS_PROGRAMS}
        yield _case(f"grad_stats-{grad}-{layout}", elementwise._grad_stats_kernel, signature, grad, layout, flags)


def _case(
    name: str, kernel: Any, signature: dict[str, str], dtype: str, layout: str, flags: dict[str, Any]
) -> CompileCase:
    constexprs = {
        "PARAM": TYPES[dtype], "GRAD": TYPES[dtype], "SKIP_NONFINITE": True, "DIGITS": 0,
        "ALIGNED": LAYOUTS[layout].aligned, "STRIDED": LAYOUTS[layout].strided, **flags,
    }  # fmt: skip
    return case_of(name, kernel, signature, constexprs, {})


def _planned(case: CompileCase, warp_size: int) -> CompileCase:
    layout = Layout(case.constexprs["ALIGNED"], case.constexprs["STRIDED"], case.constexprs.get("DIGITS", 0))
    plan = plan_elementwise(_LONG_TILE, layout, warp_size)
    return replace(
        case,
        constexprs={**case.constexprs, "TILE": plan.tile, "BLOCK": plan.block},
        options={**case.options, "num_warps": plan.num_warps},
    )
