"""The specializations of the multi-normalization kernel that are compiled and inspected without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from ..multinorm.kernels import _multinorm_kernel, _multinorm_sums_kernel
from ..multinorm.launch import plan_multinorm, rule_arguments
from ..multinorm.rule import NormRule, keeps_elements
from ..multinorm.schedule import route_of
from ..schedules import Geometry
from .aot import CompileCase
from .case_parts import TYPES, case_of

_SIGNATURE = {
    "table_ptr": "*i64", "addresses_ptr": "*i64", "scratch_ptr": "*fp32", "counters_ptr": "*i32", "skipped_ptr": "*i64",
    "found_inf": "*fp32",
    **dict.fromkeys(("segments_start", "rows_start", "first_ticket", "owners", "counters", "sweeps", "pairs"), "i32"),
    **dict.fromkeys(("lr", "update_scale", "weight_decay", "momentum", "one_minus_momentum", "eps"), "fp32"),
    "row_threshold": "fp32", "scale": "fp32", "inv_scale": "*fp32", "clip_value": None,
    "clip_coef": "*fp32",
}  # fmt: skip
_SINKGD = NormRule()
_TABLE = NormRule(("row", "col") * 5 + ("row",), row_threshold=1e-3, momentum=0.9, nesterov=True)
_AFTER = NormRule(("row", "col"), momentum=0.9, momentum_after=True)
_EVERYTHING = NormRule(("sign", "col", "row", "frobenius"))

#: name -> dtype, shape and strides of a parameter, and the rule. Names say what is compiled differently.
_CASES: dict[str, tuple[str, Geometry, NormRule]] = {
    "multinorm-bf16-rows_of_4096": ("bf16", Geometry((4096, 4096), None), _SINKGD),
    "multinorm-bf16-rows_of_11008": ("bf16", Geometry((4096, 11008), None), _SINKGD),
    "multinorm-bf16-rows_of_64": ("bf16", Geometry((4096, 64), None), _SINKGD),
    "multinorm-bf16-rows_of_28672": ("bf16", Geometry((8192, 28672), None), _SINKGD),
    "multinorm-bf16-columns_of_512": ("bf16", Geometry((512, 28672), None), _SINKGD),
    "multinorm-bf16-transposed": ("bf16", Geometry((4096, 4096), ((1, 4096), (1, 4096))), _SINKGD),
    "multinorm-bf16-misaligned": ("bf16", Geometry((4096, 1001), None), _SINKGD),
    "multinorm-bf16-strided": ("bf16", Geometry((4096, 1024), ((1024, 1), (1, 4096))), _SINKGD),
    "multinorm-bf16-row_only": ("bf16", Geometry((4096, 4096), None), NormRule(("row",))),
    "multinorm-bf16-row_of_11008_only": ("bf16", Geometry((4096, 11008), None), NormRule(("row",))),
    "multinorm-bf16-table": ("bf16", Geometry((32000, 4096), None), _TABLE),
    "multinorm-bf16-momentum_after": ("bf16", Geometry((4096, 4096), None), _AFTER),
    "multinorm-bf16-everything": ("bf16", Geometry((4096, 4096), None), _EVERYTHING),
    "multinorm-fp32-rows_of_4096": ("fp32", Geometry((4096, 4096), None), _SINKGD),
    "multinorm-fp16-rows_of_4096": ("fp16", Geometry((4096, 4096), None), _SINKGD),
}


def multinorm_cases(warp_size: int) -> Iterator[CompileCase]:
    """Return specializations for dtypes, for the ways of looking at a parameter, and for the flags that change code."""
    for name, (dtype, geometry, rule) in _CASES.items():
        yield _case(name, dtype, geometry, rule, warp_size)
    geometry = Geometry((4096, 4096), None)
    given = {"GIVEN": True, "OFFSETS": True, "SIGN": False, "KEEP": True}
    yield _case("multinorm-bf16-rank1_apply", "bf16", geometry, NormRule(("sign",)), warp_size, **given)
    scales = {"WRITE": False, "STOCHASTIC": False}
    yield _case("multinorm-bf16-scales_only", "bf16", geometry, _SINKGD, warp_size, **scales)
    # rows in several processes
    yield _case("multinorm-bf16-pieces", "bf16", geometry, _SINKGD, warp_size, pieces=True)


def sums_case() -> CompileCase:
    """Return the specialization that leaves the sums of pieces, apart: it has no tiles."""
    signature = {
        "table_ptr": "*i64", "scratch_ptr": "*fp32", "sums_ptr": "*fp32", "found_inf": "*fp32",
        **dict.fromkeys(("segments_start", "rows_start", "first_ticket"), "i32"),
    }  # fmt: skip
    return case_of("multinorm-sums", _multinorm_sums_kernel, signature, {"CROSS": True}, {"num_warps": 4})


def whole_case(warp_size: int) -> CompileCase:
    """Return the specialization for matrices that a program holds, apart: no loop of it reads or writes a tile."""
    return _case("multinorm-bf16-whole", "bf16", Geometry((64, 128), None), _TABLE, warp_size)


def _case(
    name: str, dtype: str, geometry: Geometry, rule: NormRule, warp_size: int, pieces: bool = False, **flags: Any
) -> CompileCase:
    route = route_of(geometry, True, rule)
    arguments = rule_arguments(rule, route)
    momentum = "none" if not rule.momentum else "after" if rule.momentum_after else "before"
    constexprs = {
        "PARAM": TYPES[dtype], "GRAD": TYPES[dtype], "STATE": tl.float32, "ALIGNED": route.layout.aligned,
        "STRIDED": route.layout.strided, "STOCHASTIC": dtype == "bf16", "SKIP_NONFINITE": True, "MOMENTUM": momentum,
        "NESTEROV": rule.nesterov, "GIVEN": False, "OFFSETS": False, "KEEP": keeps_elements(rule), "WRITE": True,
        **{key: value for key, value in arguments.items() if key.isupper()}, **flags,
    }  # fmt: skip
    signature = {**_SIGNATURE, "sums_ptr": "*fp32" if pieces else None}
    return case_of(name, _multinorm_kernel, signature, constexprs, plan_multinorm(route, warp_size).options())
