"""The specializations of the projection kernels that are compiled and inspected without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from ..pieces import RowPlace
from ..projection.banks import DRAW_BLOCK, DRAW_WARPS
from ..projection.kernels import _apollo_finish_kernel, _apollo_kernel, _projection_kernel
from ..projection.launch import plan_projection, route_arguments
from ..projection.schedule import ProjectionPiece, Work, route_of
from ..schedules import Geometry
from .aot import CompileCase
from .case_parts import TYPES, case_of

_SIGNATURE = {
    "table_ptr": "*i64", "addresses_ptr": "*i64", "scratch_ptr": "*fp32", "counters_ptr": "*i32", "skipped_ptr": "*i64",
    "found_inf": "*fp32",
    **dict.fromkeys(("segments_start", "rows_start", "first_ticket", "owners", "counters"), "i32"),
    # on the device, where optimizers have it
    "epoch": "*i64",
    **dict.fromkeys(("lr", "weight_decay", "one_minus_beta1", "one_minus_beta2", "log_beta1", "log_beta2"), "fp32"),
    **dict.fromkeys(("eps", "projected_scale", "root_scale", "growth_limit", "scale"), "fp32"),
    "inv_scale": "*fp32", "clip_value": None, "clip_coef": "*fp32",
}  # fmt: skip
_ALL = (0, 1, 2)

#: name -> dtype, shape and strides of a parameter, rank and phases. Names say what is compiled differently.
_CASES: dict[str, tuple[str, Geometry, int, tuple[int, ...]]] = {
    "apollo-bf16-rank_256": ("bf16", Geometry((4096, 4096), None), 256, _ALL),
    "apollo-bf16-rank_256_of_columns": ("bf16", Geometry((4096, 11008), None), 256, _ALL),
    "apollo-bf16-rank_64": ("bf16", Geometry((4096, 4096), None), 64, _ALL),
    "apollo-bf16-rank_64_misaligned": ("bf16", Geometry((4096, 1001), None), 64, _ALL),
    "apollo-bf16-rank_64_strided": ("bf16", Geometry((4096, 1024), ((1024, 1), (1, 4096))), 64, _ALL),
    "apollo-fp32-rank_64": ("fp32", Geometry((4096, 4096), None), 64, _ALL),
    "apollo-bf16-full_rank": ("bf16", Geometry((4096, 128), None), 256, _ALL),
    "apollo-bf16-rank_1": ("bf16", Geometry((4096, 4096), None), 1, _ALL),
    "apollo-bf16-rank_1_of_columns": ("bf16", Geometry((4096, 11008), None), 1, _ALL),
    "apollo-fp32-rank_1": ("fp32", Geometry((4096, 4096), None), 1, _ALL),
    "apollo-bf16-rank_1_misaligned": ("bf16", Geometry((4096, 1001), None), 1, _ALL),
    "channel_apply-bf16-aligned": ("bf16", Geometry((4096, 4096), None), 1, (2,)),
}

#: The second of eight processes, of matrices of 4096 rows, and rows that begin anywhere.
_PIECE = ProjectionPiece(4096, RowPlace(512, 512, 0), 0, 0, 0, 0)
_PIECES: dict[str, tuple[int, Geometry, ProjectionPiece]] = {
    "apollo-bf16-rank_1-pieces": (1, Geometry((512, 4096), None), _PIECE),
    "apollo-bf16-rank_1_of_columns-pieces": (1, Geometry((512, 11008), None), _PIECE),
    "apollo-bf16-rank_1_of_columns-any_pieces": (1, Geometry((512, 11008), None),
                                                 _PIECE._replace(place=RowPlace(3, 512, 0))),
    "apollo-bf16-rank_256-pieces": (256, Geometry((512, 4096), None), _PIECE),
    "apollo-bf16-rank_256_of_columns-pieces": (256, Geometry((512, 11008), None), _PIECE),
}  # fmt: skip


def projection_cases(warp_size: int) -> Iterator[CompileCase]:
    """Return specializations for dtypes, for the ways of looking at a parameter, for ranks, and for pieces."""
    cases = {name: (*case, None) for name, case in _CASES.items()}
    pieces = {name: ("bf16", geometry, rank, _ALL, piece) for name, (rank, geometry, piece) in _PIECES.items()}
    for name, (dtype, geometry, rank, phases, piece) in {**cases, **pieces}.items():
        narrow = dtype == "bf16"
        work = Work(phases, rank, "std", False, narrow)
        route = route_of(geometry, True, work, piece)
        plan = plan_projection(route, narrow, warp_size)
        arguments = route_arguments(route, work, plan, "gaussian")
        # compiled on a CPU, where plans are for the interpreter
        operand = tl.bfloat16 if narrow else tl.float32
        constexprs: dict[str, Any] = {
            "PARAM": TYPES[dtype], "GRAD": TYPES[dtype], "STATE": tl.float32, "ALIGNED": route.layout.aligned,
            "STRIDED": route.layout.strided, "STOCHASTIC": dtype == "bf16", "SKIP_NONFINITE": True,
            "TENSOR": rank == 1, "LIMIT": True,
            **{key: value for key, value in arguments.items() if key.isupper()}, "OPERAND": operand,
        }  # fmt: skip
        signature = {**_SIGNATURE, "sums_ptr": "*fp32" if piece else None}
        yield case_of(name, _apollo_kernel, signature, constexprs, plan.options())


def finish_case() -> CompileCase:
    """Return the specialization that follows the moments of pieces, apart: it has no tiles."""
    signature = {
        **dict.fromkeys(("table_ptr", "addresses_ptr"), "*i64"),
        **dict.fromkeys(("scratch_ptr", "sums_ptr", "found_inf"), "*fp32"), "rows_start": "i32",
        **dict.fromkeys(("log_beta1", "log_beta2", "root_scale", "growth_limit"), "fp32"),
    }  # fmt: skip
    flags = {"RIGHT": False, "LINES_BY_8": True, "LENGTH_BY_8": True, "SKIP_NONFINITE": True, "TENSOR": False}
    return case_of("apollo_finish", _apollo_finish_kernel, signature, {**flags, "LIMIT": True}, {"num_warps": 4})


def draw_case() -> CompileCase:
    """Return the specialization of the kernel that draws projections, which has no loop over elements to report."""
    pointers = {"projection_ptr": "*bf16", "drawn_ptr": "*i64", "epoch": "*i64"}
    absent = dict.fromkeys(("first_row", "run", "distance"))
    signature = {**pointers, "key": "i64", "length": "i32", "tag": "i32", **absent}
    constexprs = {"SIGNS": False, "BLOCK": DRAW_BLOCK}
    return case_of("projection-bf16-aligned", _projection_kernel, signature, constexprs, {"num_warps": DRAW_WARPS})
