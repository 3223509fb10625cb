"""Launching the projection kernels: one launch for each route that occurs, and one for each projection to be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..arguments import TRITON_DTYPES, compiler_options, device_scalar, log_of, taken_by, update_arguments
from ..blocks import read_gradient
from ..device import device_facts, launching_on
from ..dispatch import interpreting
from ..options import GradTransform, Rounding
from ..pieces import TOGETHER, RowPieces
from ..schedules import cut_out, fields_of, launch_schedule, phase_by_phase, remembered_schedules
from ..table import addresses, starts_aligned, uploaded
from ..tensors import remembered
from ..tickets import plan_order
from .banks import Bank, Part, projections_of
from .draw import draw_key, key_of, torch_projection
from .fields import COLUMNS, FIELDS
from .kernels import _apollo_finish_kernel, _apollo_kernel
from .rule import ApolloRule, Draw, Sides, channel_shape, moment_shape, projected_scale, sides_of
from .schedule import ProjectionPiece, ProjectionSchedule, Route, Work, pieces_of, schedules_of


@dataclass(frozen=True)
class ProjectionPlan:
    """Warps, registers of a thread (None: as many as it wants), stages of the pipeline of products, their precision."""

    num_warps: int
    maxnreg: int | None
    num_stages: int
    operand: Any
    precision: str

    def options(self) -> dict[str, Any]:
        """Return the compiler's options."""
        return compiler_options(self.num_warps, self.maxnreg, num_stages=self.num_stages)


def plan_projection(route: Route, narrow: bool, warp_size: int) -> ProjectionPlan:
    """Return the plan of one launch. Sums depend on tiles, which are the route's.

    Without products 128 registers, so that a processor has two programs of 8 warps: one reads while the other adds.

    Projections have the digits of bfloat16, and so bfloat16 gradients are multiplied as they are, by tensor cores.
    Others, and projections of the source "torch", take three products of TF32 ("tf32x3"), which are as good as fp32;
    AMD's compiler takes "ieee" only. Triton's interpreter would multiply the bits of bfloat16. ``narrow`` says which.
    """
    return ProjectionPlan(
        num_warps=8 if route.layout.aligned or route.mode == "dot" else 16,
        maxnreg=128 if route.layout.aligned and route.mode != "dot" and warp_size == 32 else None,
        num_stages=3 if narrow and warp_size == 32 else 1,
        operand=tl.bfloat16 if narrow and not interpreting() else tl.float32,
        precision="ieee" if narrow or warp_size != 32 else "tf32x3",
    )


def takes_bfloat16(grads: Sequence[Tensor], source: str) -> bool:
    """Say whether gradients and projections both have no more digits than bfloat16."""
    return bool(grads) and grads[0].dtype is torch.bfloat16 and source != "torch"


def apollo_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norms: Sequence[Tensor],
    epochs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    rule: ApolloRule,
    draw: Draw,
    pieces: RowPieces | None = None,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.projection.apollo_update_`: one launch for each route that occurs; of pieces, each phase."""
    columns = {
        "param": params, "grad": grads, "step": steps, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs,
        "norm": norms, "epoch": epochs,
    }  # fmt: skip
    work = Work((0, 1, 2), rule.rank, rule.proj_type, rule.conv, takes_bfloat16(grads, draw.source))
    beta1, beta2 = rule.betas
    _launch(
        columns, work, draw, transform, rounding, pieces,
        lr=device_scalar(lr), weight_decay=float(weight_decay), one_minus_beta1=1 - beta1, one_minus_beta2=1 - beta2,
        log_beta1=log_of(beta1), log_beta2=log_of(beta2), eps=float(rule.eps), root_scale=math.sqrt(rule.scale),
        growth_limit=float(rule.growth_limit or 0.0), TENSOR=rule.scale_type == "tensor",
        LIMIT=rule.growth_limit is not None,
    )  # fmt: skip
    # the kernel wrote through addresses, which autograd cannot see: tell it that saved parameters are stale
    torch.autograd.graph.increment_version(params)


def project(
    grads: Sequence[Tensor],
    *,
    rank: int,
    draw: Draw,
    proj_type: str = "std",
    conv: bool = False,
    transform: GradTransform,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `lowmem_kernels.projection.project`: the first read of `apollo_update_`."""
    projected: list[Tensor] = [torch.empty(0) for _ in grads]
    squares: list[Tensor] = [torch.empty(0) for _ in grads]
    work = Work((0,), rank, proj_type, conv, takes_bfloat16(grads, draw.source))
    given = GradTransform(transform.inv_scale, transform.clip_value, transform.clip_coef, transform.maximize)
    columns = {"param": grads, "grad": grads}
    for schedule, scratch in _launch(columns, work, draw, given, Rounding(), **_NO_UPDATE):
        for i, fields in fields_of(schedule, FIELDS):
            shape = tuple(grads[i].shape)
            squares[i] = cut_out(scratch, fields["squares"], channel_shape(shape, rank, proj_type, conv))
            if schedule.route.mode == "none":
                projected[i] = _transformed(grads[i], given)
            else:
                moments = moment_shape(shape, ApolloRule(rank, proj_type=proj_type, conv=conv))
                projected[i] = cut_out(scratch, fields["projected"], moments) * projected_scale(fields["rank"])
    return projected, squares


def channel_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    proj_type: str = "std",
    conv: bool = False,
    transform: GradTransform,
    rounding: Rounding,
) -> None:
    """As `lowmem_kernels.projection.channel_apply_`: the last read of `apollo_update_`."""
    columns = {"param": params, "grad": grads, "step": steps, "scale": scales}
    arguments = {**_NO_UPDATE, "lr": device_scalar(lr), "weight_decay": float(weight_decay)}
    _launch(columns, Work((2,), 1, proj_type, conv, False), None, transform, rounding, **arguments)
    torch.autograd.graph.increment_version(params)


def projection_matrix(
    shape: Sequence[int],
    *,
    rank: int,
    draw: Draw,
    proj_type: str = "std",
    conv: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """As `lowmem_kernels.projection.projection_matrix`: drawn into memory of its own."""
    sides, device, (uid,) = sides_of(tuple(shape), rank, proj_type, conv), torch.device(device), draw.uids_of(1)
    if not sides.projected:
        return torch.eye(sides.contracted, device=device)
    if draw.source == "torch":
        values = torch_projection(sides, draw.seed + uid + 1, int(draw.epoch), device)
    else:
        bank = Bank(sides, draw.source, *key_of(sides, draw, uid), device)
        bank.draw(draw.epoch)
        values = bank.values.float()
    return values * projected_scale(sides.rank)


#: Arguments of the kernel where it makes no moments.
_NO_UPDATE: dict[str, Any] = {
    **dict.fromkeys(("lr", "weight_decay", "one_minus_beta1", "one_minus_beta2", "log_beta1", "log_beta2"), 0.0),
    **dict.fromkeys(("eps", "root_scale", "growth_limit"), 0.0), "TENSOR": False, "LIMIT": False,
}  # fmt: skip

#: Columns that are read as tiles.
_TILED = [COLUMNS.index(name) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]


def _launch(
    columns: dict[str, Sequence[Tensor]],
    work: Work,
    draw: Draw | None,
    transform: GradTransform,
    rounding: Rounding,
    pieces: RowPieces | None = None,
    **arguments: Any,
) -> list[tuple[ProjectionSchedule, Tensor]]:
    """Launch over all parameters; return each schedule with its scratch."""
    params, grads, exp_avgs = columns["param"], columns["grad"], columns.get("exp_avg")
    if not params:
        return []
    device = params[0].device
    facts = device_facts(device)
    places, sizes, order = None, (0, 0), plan_order(facts)
    if pieces is not None:
        places, sizes = _pieces(params, pieces, work, arguments["TENSOR"])
        order = TOGETHER
    projections, source, draw_keys = None, "gaussian", (0,) * len(params)
    epoch: int | Tensor = 0
    if draw is not None:
        sides, parts = _sides(params, work, places)
        projections, source = projections_of(params, sides, draw, parts), draw.source
        draw_keys, epoch = _draw_keys(draw.seed, tuple(draw.uids_of(len(params)))), draw.epoch
    where = addresses([columns.get(name, projections if name == "projection" else None) for name in COLUMNS])
    aligned = starts_aligned(where[:, _TILED])

    def arguments_of(schedule: ProjectionSchedule) -> dict[str, Any]:
        route = schedule.route
        return {
            "epoch": epoch, "STATE": TRITON_DTYPES[exp_avgs[0].dtype] if exp_avgs else tl.float32,
            **route_arguments(route, work, plan_projection(route, work.narrow, facts.warp_size), source),
            **update_arguments(params, grads, route.layout, transform, rounding), **arguments,
        }  # fmt: skip

    keys, itemsize = rounding.keys(len(params)), grads[0].itemsize
    launched = [
        (schedule, torch.empty(schedule.scratch, dtype=torch.float32, device=device))
        for schedule in _schedules(params, grads, aligned, keys, draw_keys, work, itemsize, order, places)
    ]
    launches = [
        partial(launch_schedule, _apollo_kernel, schedule, params, where, scratch, **arguments_of(schedule))
        for schedule, scratch in launched
    ]
    if pieces is None:
        for launch in launches:
            launch(sums_ptr=None)
        return launched
    finishes = [
        partial(_finish, schedule, params, where, scratch, arguments_of(schedule))
        for schedule, scratch in launched
        if schedule.route.right or schedule.route.mode == "none"
    ]
    _launch_phases([schedule for schedule, _ in launched], launches, finishes, sizes, pieces, device)
    return launched


def _launch_phases(
    schedules: Sequence[ProjectionSchedule],
    launches: Sequence[Callable[..., None]],
    finishes: Sequence[Callable[[Tensor], None]],
    sizes: tuple[int, int],
    pieces: RowPieces,
    device: torch.device,
) -> None:
    """Launch phase after phase of all schedules; after the first two, add up over processes what these have left."""
    launch_phase = phase_by_phase(schedules, launches, device)
    first, second = sizes
    sums = torch.zeros(first + second, dtype=torch.float32, device=device)
    launch_phase(0, sums)
    pieces.all_reduce(sums[:first])
    launch_phase(1, sums)
    if second:
        pieces.all_reduce(sums[first:])
    for finish in finishes:
        finish(sums)
    launch_phase(2, sums)


def _finish(
    schedule: ProjectionSchedule,
    params: Sequence[Tensor],
    where: np.ndarray,
    scratch: Tensor,
    arguments: dict[str, Any],
    sums: Tensor,
) -> None:
    """Launch what follows the moments of pieces: a program for each parameter."""
    table = uploaded(params, schedule, schedule.values)
    pointers = uploaded(params, (schedule, "addresses"), where[schedule.members].ravel())
    taken = taken_by(_apollo_finish_kernel, arguments)
    with launching_on(params[0].device):
        _apollo_finish_kernel[(len(schedule.members),)](
            table, pointers, scratch, sums, rows_start=schedule.rows_start, **taken, num_warps=4, enable_fp_fusion=False
        )


def route_arguments(route: Route, work: Work, plan: ProjectionPlan, source: str) -> dict[str, Any]:
    """Return the kernel's arguments that follow from what is done, and how a parameter is looked at."""
    return {
        "projected_scale": projected_scale(work.rank) if route.mode != "none" else 1.0,
        "PROJECTION": tl.float32 if source == "torch" else tl.bfloat16,
        "CONTIGUOUS": route.contiguous,
        "RIGHT": route.right,
        "LINES_BY_8": route.lines_by_8,
        "LENGTH_BY_8": route.length_by_8,
        "RANK_BY_8": route.rank_by_8,
        "READ": 0 in work.phases,
        "MOMENTS": 1 in work.phases,
        "WRITE": 2 in work.phases,
        "MODE": route.mode,
        "DRAWN": source != "torch",
        "PLACES": route.places,
        "OPERAND": plan.operand,
        "PRECISION": plan.precision,
        "BLOCK_LINES": route.tile.rows,
        "BLOCK_PLACES": route.tile.cols,
        "RANKS_AT_A_TIME": route.ranks,
        "MOMENT_LINES": route.moment_tile.rows,
        "MOMENT_RANKS": route.moment_tile.cols,
        "APPLY_LINES": route.apply_tile.rows,
        "APPLY_PLACES": route.apply_tile.cols,
        **plan.options(),
    }


def _pieces(
    params: Sequence[Tensor], pieces: RowPieces, work: Work, tensor: bool
) -> tuple[tuple[ProjectionPiece, ...], tuple[int, int]]:
    def make() -> tuple[tuple[ProjectionPiece, ...], tuple[int, int]]:
        return pieces_of([tuple(p.shape) for p in params], pieces, work, tensor)

    return remembered([params], ("pieces", pieces.rows, pieces.places, work, tensor), make)


def _sides(
    tensors: Sequence[Tensor], work: Work, pieces: tuple[ProjectionPiece, ...] | None
) -> tuple[tuple[Sides, ...], tuple[Part | None, ...]]:
    """How the whole parameters are projected, and which of their contracted elements are here; None: all."""

    def make() -> tuple[tuple[Sides, ...], tuple[Part | None, ...]]:
        shapes = [tuple(t.shape) for t in tensors]
        if pieces is None:
            sides = [sides_of(shape, work.rank, work.proj_type, work.conv) for shape in shapes]
            return tuple(sides), (None,) * len(sides)
        wholes = [(*shape[:-2], piece.rows, shape[-1]) for shape, piece in zip(shapes, pieces, strict=True)]
        sides = [sides_of(shape, work.rank, work.proj_type, work.conv) for shape in wholes]
        parts = [
            None if side.right else Part(piece.place, shape[-2])
            for side, piece, shape in zip(sides, pieces, shapes, strict=True)
        ]
        return tuple(sides), tuple(parts)

    return remembered([tensors], ("sides", work, pieces), make)


# for plain lists, of which nothing is remembered
_schedules_of = lru_cache(maxsize=64)(schedules_of)
_schedules = partial(remembered_schedules, _schedules_of)


@lru_cache(maxsize=64)
def _draw_keys(seed: int, uids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([draw_key(seed, uid) for uid in uids])


def _transformed(grad: Tensor, transform: GradTransform) -> Tensor:
    """What stands for its projection, in fp32."""
    return read_gradient(grad, transform)[0].clone(memory_format=torch.contiguous_format)
