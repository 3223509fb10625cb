"""The specializations of the whitening kernels that are compiled and inspected without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from ..whitening import kernels
from ..whitening.launch import ADVANCE_BLOCK, STATS_WARPS, plan_products
from ..whitening.schedule import STATS_COLS, STATS_ROWS
from .aot import CompileCase
from .case_parts import LAYOUTS, TYPES, case_of

_POINTERS = {
    "table_ptr": "*i64", "addresses_ptr": "*i64", "stats_ptr": "*fp32", "bad_ptr": "*i32", "gram_ptr": "*fp32",
    "root_ptr": "*fp32", "inverse_ptr": "*fp32", "found_inf": "*fp32", "skipped_ptr": "*i64",
}  # fmt: skip
_SIGNATURE = {
    **_POINTERS,
    **dict.fromkeys(("matrices", "all_rows", "first", "count", "first_tile", "size", "owners"), "i32"),
    "scale": "fp32", "inv_scale": "*fp32", "clip_value": None, "clip_coef": "*fp32",
    **dict.fromkeys(("lr", "update_scale", "weight_decay"), "fp32"),
}  # fmt: skip
#: As the launcher passes them for D in fp32 itself.
_WHITENED = {**_SIGNATURE, "found_inf": None, "lr": None}


def whitening_cases(warp_size: int) -> Iterator[CompileCase]:
    """Return specializations of the kernels that read gradients: dtypes, layouts, sides, tiles, solvers."""
    constexprs: dict[str, Any]
    for name, dtype, layout, centre in (
        ("row_stats-bf16-aligned", "bf16", "aligned", True),
        ("row_stats-fp32-aligned", "fp32", "aligned", True),
        ("row_stats-bf16-aligned-not_centred", "bf16", "aligned", False),
        ("row_stats-bf16-misaligned", "bf16", "misaligned", True),
        ("row_stats-bf16-strided", "bf16", "strided", True),
    ):
        constexprs = {"CENTRE": centre, "NORMALIZE": True, "BLOCK_M": STATS_ROWS, "BLOCK_N": STATS_COLS}
        yield _case(name, kernels._row_stats_kernel, _SIGNATURE, dtype, layout, constexprs, {"num_warps": STATS_WARPS})
    for side in ("left", "right"):
        for dtype, layout, block, exact in (
            ("bf16", "aligned", 128, True),
            ("bf16", "aligned", 64, True),
            ("bf16", "aligned", 128, False),
            ("fp32", "aligned", 128, True),
            ("bf16", "misaligned", 64, True),
            ("bf16", "strided", 64, True),
        ):
            plan = plan_products(block, exact, LAYOUTS[layout], warp_size)
            # in the order of a tile's rows and columns, by which loops.py knows the loads of a loop
            sides = {"BLOCK": block, "BLOCK_K": plan.block_k}
            constexprs = dict(reversed(sides.items())) if side == "right" else dict(sides)
            constexprs |= {
                "RIGHT": side == "right", "PRECISION": plan.precision, "UPDATE": True, "STOCHASTIC": dtype == "bf16",
            }  # fmt: skip
            options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
            name = f"{dtype}-{layout}-{side}-{block}-{'exact' if exact else 'fast'}"
            yield _case(f"gram-{name}", kernels._gram_kernel, _SIGNATURE, dtype, layout, constexprs, options)
            apply = kernels._whiten_apply_kernel
            yield _case(f"whiten_apply-{name}", apply, _SIGNATURE, dtype, layout, constexprs, options)
            if dtype == "bf16" and layout == "aligned" and block == 128 and exact:
                constexprs |= {"UPDATE": False, "STOCHASTIC": False, "PARAM": tl.float32, "SKIP_NONFINITE": False}
                yield _case(f"whitened-{name}", apply, _WHITENED, dtype, layout, constexprs, options)


def advance_case() -> CompileCase:
    """Return the one specialization of the kernel that ends a call, which has no loop over elements to report."""
    constexprs, options = {"BLOCK": ADVANCE_BLOCK}, {"num_warps": 4}
    return _case("advance-fp32-aligned", kernels._advance_kernel, _SIGNATURE, "fp32", "aligned", constexprs, options)


def _case(
    name: str,
    kernel: Any,
    signature: dict[str, str | None],
    dtype: str,
    layout_name: str,
    constexprs: dict[str, Any],
    options: dict[str, Any],
) -> CompileCase:
    layout = LAYOUTS[layout_name]
    constexprs = {
        "PARAM": TYPES[dtype], "GRAD": TYPES[dtype], "ALIGNED": layout.aligned, "STRIDED": layout.strided,
        "SKIP_NONFINITE": True, **constexprs,
    }  # fmt: skip
    # where rows of p are whole vectors, so is the side of a Gram matrix of typical weights
    return case_of(name, kernel, signature, constexprs, options, ("size",) if layout.aligned else ())
