"""The specializations of the factored kernels that are compiled and inspected without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..factored.kernels import _confidence_kernel, _factored_kernel
from ..factored.launch import plan_factored
from ..factored.schedule import HALF_NARROW, HALF_WIDE, NARROW, WIDE
from .aot import CompileCase
from .case_parts import LAYOUTS, TYPES, case_of

_COMMON = {
    "table_ptr": "*i64", "addresses_ptr": "*i64", "scratch_ptr": "*fp32", "counters_ptr": "*i32", "skipped_ptr": "*i64",
    "found_inf": "*fp32", "sums_ptr": None,
    **dict.fromkeys(("segments_start", "rows_start", "first_ticket", "owners", "counters"), "i32"),
    "scale": "fp32", "inv_scale": "*fp32", "clip_value": None, "clip_coef": "*fp32",
    **dict.fromkeys(("lr", "weight_decay", "eps1", "eps2", "clip_threshold", "one_minus_beta1"), "fp32"),
}  # fmt: skip
_ADAFACTOR = {**_COMMON, "beta2_weight": None, "decay_rate": "fp32"}
_CAME = {**_COMMON, "one_minus_beta2": "fp32", "one_minus_beta3": "fp32"}
_RULE = {
    "EPS_FLOOR": False, "SCHEDULE": "rsqrt", "SCALE_PARAMETER": True, "SCALE_DECAY": True, "MOMENTUM": False,
    "CARRY": True,
}  # fmt: skip


def factored_cases(warp_size: int) -> Iterator[CompileCase]:
    """Return specializations of both kernels: dtypes, layouts, tiles, and the flags that change what is compiled."""
    flags: dict[str, Any]
    for name, dtype, layout, flags in (
        ("adafactor-bf16-aligned-stochastic", "bf16", "aligned", {"STOCHASTIC": True}),
        ("adafactor-bf16-aligned-narrow", "bf16", "aligned", {"STOCHASTIC": True, "narrow": True}),
        ("adafactor-fp32-aligned", "fp32", "aligned", {}),
        ("adafactor-fp16-aligned", "fp16", "aligned", {}),
        ("adafactor-bf16-misaligned-narrow", "bf16", "misaligned", {"STOCHASTIC": True, "narrow": True}),
        ("adafactor-bf16-strided-stochastic", "bf16", "strided", {"STOCHASTIC": True}),
        ("adafactor-bf16-aligned-momentum", "bf16", "aligned", {"STOCHASTIC": True, "MOMENTUM": True}),
        ("adafactor-bf16-aligned-floor", "bf16", "aligned", {"EPS_FLOOR": True, "SCALE_DECAY": False}),
    ):
        yield _case(name, _factored_kernel, _ADAFACTOR, dtype, "fp32", layout, {**_RULE, **flags}, warp_size)
    # lr on the device, clipping by value, constant beta2, nothing carried
    signature = {**_ADAFACTOR, "lr": "*fp32", "clip_value": "fp32", "beta2_weight": "fp32", "decay_rate": "fp32"}
    flags = {**_RULE, "SCHEDULE": "constant", "CARRY": False}
    yield _case(
        "adafactor-bf16-aligned-all_options", _factored_kernel, signature, "bf16", "fp32", "aligned", flags, warp_size
    )
    # rows in several processes
    signature = {**_ADAFACTOR, "sums_ptr": "*fp32"}
    flags = {**_RULE, "STOCHASTIC": True}
    yield _case(
        "adafactor-bf16-aligned-pieces", _factored_kernel, signature, "bf16", "fp32", "aligned", flags, warp_size
    )
    signature = {**_CAME, "sums_ptr": "*fp32"}
    yield _case(
        "came-bf16-state_fp32-aligned-pieces", _confidence_kernel, signature, "bf16", "fp32", "aligned",
        {"STOCHASTIC": True}, warp_size,
    )  # fmt: skip
    for name, dtype, state, layout, flags in (
        ("came-bf16-state_fp32-aligned-stochastic", "bf16", "fp32", "aligned", {"STOCHASTIC": True}),
        ("came-bf16-state_bf16-aligned-stochastic", "bf16", "bf16", "aligned", {"STOCHASTIC": True}),
        ("came-fp32-state_fp32-aligned", "fp32", "fp32", "aligned", {}),
        ("came-bf16-state_fp32-strided-stochastic", "bf16", "fp32", "strided", {"STOCHASTIC": True}),
    ):
        yield _case(name, _confidence_kernel, _CAME, dtype, state, layout, flags, warp_size)


def _case(
    name: str,
    kernel: Any,
    signature: dict[str, str | None],
    dtype: str,
    state: str,
    layout_name: str,
    flags: dict[str, Any],
    warp_size: int,
) -> CompileCase:
    layout = LAYOUTS[layout_name]
    wide, narrow = (WIDE, NARROW) if layout.aligned else (HALF_WIDE, HALF_NARROW)
    plan = plan_factored(narrow if flags.get("narrow") else wide, layout, warp_size)
    constexprs = {
        "PARAM": TYPES[dtype], "GRAD": TYPES[dtype], "STATE": TYPES[state],
        "ALIGNED": layout.aligned, "STRIDED": layout.strided, "STOCHASTIC": False, "SKIP_NONFINITE": True,
        "BLOCK_ROWS": plan.tile.rows, "BLOCK_COLS": plan.tile.cols, **flags,
    }  # fmt: skip
    return case_of(name, kernel, signature, constexprs, plan.options())
