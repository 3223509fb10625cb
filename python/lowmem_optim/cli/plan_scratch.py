"""Temporaries of a step by the schedules that launches use: the scratch that they would ask the allocator for."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lowmem_kernels.device import HOPPER
from lowmem_kernels.factored import schedule as factored
from lowmem_kernels.lowrank.schedule import padded_rank
from lowmem_kernels.multinorm import NormRule
from lowmem_kernels.multinorm import schedule as multinorm
from lowmem_kernels.projection import schedule as projection
from lowmem_kernels.projection.draw import is_shared
from lowmem_kernels.projection.rule import sides_of
from lowmem_kernels.schedules import Geometry, Schedule
from lowmem_kernels.tickets import plan_order
from lowmem_kernels.whitening import schedule as whitening
from lowmem_kernels.whitening.solver import BUFFERS
from lowmem_optim.adamw import AdamW
from lowmem_optim.apollo import APOLLO
from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.buckets import Bucket
from lowmem_optim.came import CAME
from lowmem_optim.factored import FactoredOptimizer
from lowmem_optim.fallbacks import TABLE
from lowmem_optim.lomo import Lomo
from lowmem_optim.mngd import MNGD
from lowmem_optim.partial import PartialMomentum
from lowmem_optim.swan import SWAN

Shapes = tuple[tuple[int, ...], ...]

ORDER = plan_order(HOPPER)
FP32 = 4


def scratch_bytes(optimizer: LowMemOptimizer, bucket: Bucket) -> int | None:
    """Bytes that the update of a bucket allocates on a GPU, by its schedule on an H100.

    Only shapes and dtypes of its tensors matter. None for an optimizer that nobody has said it of, here.
    """
    shapes = tuple(tuple(param.shape) for param in bucket.params)
    itemsize = bucket.grads[0].itemsize
    if bucket.rule == "adamw" or isinstance(optimizer, (AdamW, Lomo)):
        return 0
    if bucket.rule == "adafactor" or isinstance(optimizer, FactoredOptimizer):
        return _factored(shapes, ("look", "columns", "apply"), itemsize)
    if isinstance(optimizer, CAME):
        return _factored(shapes, ("look", "columns", "residual", "residual_columns", "apply"), itemsize)
    if bucket.rule == "table":
        return _multinorm(shapes, TABLE, itemsize)
    conv = bucket.group.get("stacks") == "conv"
    if isinstance(optimizer, SWAN):
        return _whitening(shapes, conv)
    if isinstance(optimizer, MNGD):
        rule = optimizer.rule(bucket.group)
        return _whitening(shapes, conv) if "spectral" in rule.norms else _multinorm(shapes, rule, itemsize)
    if isinstance(optimizer, APOLLO):
        bfloat16 = bucket.grads[0].dtype is torch.bfloat16
        apollo = optimizer.rule(bucket.group)
        work = projection.Work((0, 1, 2), apollo.rank, apollo.proj_type, conv, bfloat16)
        return _projection(shapes, work, bucket.group["source"], itemsize)
    if isinstance(optimizer, PartialMomentum):
        return _lowrank(bucket)
    return None


@lru_cache(maxsize=1024)
def _factored(shapes: Shapes, phases: tuple[str, ...], itemsize: int) -> int:
    count = len(shapes)
    return _bytes(factored.schedules_of(_geometries(shapes), [True] * count, [0] * count, phases, itemsize, ORDER))


@lru_cache(maxsize=1024)
def _multinorm(shapes: Shapes, rule: NormRule, itemsize: int) -> int:
    count = len(shapes)
    return _bytes(multinorm.schedules_of(_geometries(shapes), [True] * count, [0] * count, rule, True, itemsize, ORDER))


@lru_cache(maxsize=1024)
def _projection(shapes: Shapes, work: projection.Work, source: str, itemsize: int) -> int:
    """Scratch, and the projections: in bfloat16, shared by parameters with as many contracted elements, or torch's."""
    count = len(shapes)
    keys = [0] * count
    schedules = projection.schedules_of(_geometries(shapes), [True] * count, keys, keys, work, itemsize, ORDER)
    sides = [sides_of(shape, work.rank, work.proj_type, work.conv) for shape in shapes]
    if source == "torch":
        return _bytes(schedules) + sum(FP32 * side.contracted * side.rank for side in sides if side.projected)
    shared = {(side.contracted, side.rank) for side in sides if side.projected and is_shared(side, source)}
    return _bytes(schedules) + sum(2 * contracted * rank for contracted, rank in shared)


@lru_cache(maxsize=1024)
def _whitening(shapes: Shapes, conv: bool) -> int:
    """Row statistics, and the square matrices of the largest group of problems that are solved together."""
    count = len(shapes)
    geometries = [whitening.Geometry(shape, None) for shape in shapes]
    total = 0
    for schedule in whitening.schedules_of(geometries, [True] * count, [0] * count, conv):
        squares = (group.count * group.size**2 for group in schedule.groups)
        total = max(total, 2 * FP32 * schedule.rows + BUFFERS * FP32 * max(squares, default=0))
    return total


def _lowrank(bucket: Bucket) -> int:
    """Copies of the factors, four r x r matrices for each matrix, and a sum for each row and column."""
    momentum, second = bucket.rule.split()
    total = 0
    for param in bucket.params:
        if param.ndim >= 2 and second != "element":
            total += param.numel() // param.shape[-1] + param.numel() // param.shape[-2]
    if momentum == "lowrank":
        lefts, rights = bucket.state("exp_avg_left"), bucket.state("exp_avg_right")
        for left, right in zip(lefts, rights, strict=True):
            total += left.numel() + right.numel() + 4 * _stack(left) * padded_rank(left.shape[-1]) ** 2
    return FP32 * total


def _stack(tensor: Tensor) -> int:
    return tensor.shape[:-2].numel()


def _geometries(shapes: Shapes) -> tuple[Geometry, ...]:
    return tuple(Geometry(shape, None) for shape in shapes)


def _bytes(schedules: Sequence[Schedule]) -> int:
    """Scratch and tables of the launches, which are held until the last."""
    return sum(FP32 * schedule.scratch + schedule.values.nbytes for schedule in schedules)
