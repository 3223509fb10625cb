"""What AdaPM and AdamMini share: blocks with moments of their own, their state, and a table of what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowmem_kernels.lowrank import MomentumRule, partial_momentum_update_

from .base import LowMemOptimizer, StateDict
from .blocks import POLICY, Block, Choice, Policy, blocks_of
from .buckets import Bucket, Part
from .checks import CommonOptions
from .pieces import Dims, stand_in

#: The key of a group under which the blocks of its parameters are.
BLOCKS = "blocks"
_MOMENTUM = ("exp_avg", "exp_avg_left", "exp_avg_right")


class PartialMomentum(LowMemOptimizer):
    """Base class: a group has, besides common options, head_dim, betas, eps and weight_decay.

    ``policy``, the optimizer's or a group's own, is not kept: what it says is found when a group is added.
    """

    #: the momentum of each kind of block where there is no policy
    momenta: ClassVar[Mapping[str, str]] = POLICY

    def __init__(
        self, params: ParamsT, own: dict[str, Any], common: CommonOptions, policy: Policy | str | None
    ) -> None:
        self._policy = policy
        super().__init__(params, own, common)

    # what a subclass says

    def rule_for(self, group: Mapping[str, Any]) -> MomentumRule:
        """Return how a group's low-rank momenta follow, and how its updates are clipped."""
        raise NotImplementedError

    def rank_of(self, group: Mapping[str, Any]) -> int:
        """Return the rank of a group's low-rank momenta."""
        raise NotImplementedError

    def second_moment_of(self, group: Mapping[str, Any]) -> str:
        """Return which second moment a group has."""
        raise NotImplementedError

    # blocks

    def complete_group(self, group: dict[str, Any]) -> None:
        if BLOCKS in group:
            return
        names = group.get("param_names") or [""] * len(group["params"])
        second = self.second_moment_of(group)
        choice = Choice(group.pop("policy", self._policy), self.momenta, second, group["head_dim"], group.get("role"))
        blocks = blocks_of(names, group["params"], choice)
        # plain tuples, which a checkpoint may hold
        group[BLOCKS] = tuple([tuple([tuple(block) for block in each]) for each in blocks])

    def __setstate__(self, state: StateDict) -> None:
        self.__dict__.setdefault("_policy", None)
        super().__setstate__(state)
        for group in self.param_groups:
            self.complete_group(group)

    def parts_of(self, param: Tensor, group: Mapping[str, Any], place: int) -> Sequence[Part]:
        parts = []
        for number, block in enumerate(_blocks(group, place)):
            part = Part(number=number, where=block.where)
            parts.append(part._replace(rule=f"{self._momentum(block, part.of(param), group)} {block.second}"))
        return parts

    def state_of(self, param: Tensor, group: Mapping[str, Any], place: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for part, block in zip(self.parts_of(param, group, place), _blocks(group, place), strict=True):
            own = self._state(part.of(param), block, group)
            if part.number:
                own = {"step": torch.zeros((), dtype=torch.float32, device=param.device), **own}
            state.update({part.key(key): value for key, value in own.items()})
        return state

    def state_dims(self, key: str, param: Tensor, group: Mapping[str, Any], place: int) -> Dims:
        name, _, number = key.partition(".")
        block = _blocks(group, place)[int(number or 0)]
        outer, last = range(param.ndim - 2), param.ndim - 1
        if name == "exp_avg_left":
            dims: Dims = (*range(last), None)
        elif name == "exp_avg_right":
            dims = (*outer, None, last)
        elif block.second in ("rows", "cols") and name.startswith("exp_avg_sq_"):
            # of groups of lines, and of stacks, no cut of the parameter is one
            single = param.ndim == 2 and block.size == 1
            dims = ((0 if block.second == "rows" else 1) if single else None,)
        else:
            dims = super().state_dims(key, param, group, place)
        # what lies in a process of a slice is no range of what lies there of the parameter
        return [None if block.where is not None and dim == block.where[0] else dim for dim in dims]

    def start_of(self, key: str, shape: torch.Size) -> Tensor | None:
        return starting_rows(*shape[-2:]).expand(shape) if key.startswith("exp_avg_right") else None

    def _momentum(self, block: Block, part: Tensor, group: Mapping[str, Any]) -> str:
        # a momentum of rank 0 is none
        return "none" if block.momentum == "lowrank" and self._rank(part, group) == 0 else block.momentum

    def _rank(self, part: Tensor, group: Mapping[str, Any]) -> int:
        return min(self.rank_of(group), *part.shape[-2:]) if part.numel() else 0

    def _state(self, part: Tensor, block: Block, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The moments of a block, before its first update."""
        shape = tuple(part.shape)
        shapes: dict[str, tuple[int, ...]] = {}
        state = {}
        momentum = self._momentum(block, part, group)
        if momentum == "full":
            shapes["exp_avg"] = shape
        elif momentum == "lowrank":
            rank = self._rank(part, group)
            shapes["exp_avg_left"] = (*shape[:-1], rank)
            right = torch.empty((*shape[:-2], rank, shape[-1]), dtype=torch.float32, device=part.device)
            if part.device.type != "meta":
                right.copy_(starting_rows(rank, shape[-1]))
            state["exp_avg_right"] = right
        if block.second == "element":
            shapes["exp_avg_sq"] = shape
        if block.second == "factored":
            shapes |= {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}
        if block.second == "rows":
            shapes["exp_avg_sq_row"] = (_groups(prod(shape[:-1]), block.size),)
        if block.second == "cols":
            shapes["exp_avg_sq_col"] = (prod(shape[:-2]) * _groups(shape[-1], block.size),)
        return {k: torch.zeros(s, dtype=torch.float32, device=part.device) for k, s in shapes.items()} | state

    # the update

    def update(self, bucket: Bucket) -> None:
        group = bucket.group
        momentum, second = bucket.rule.split()
        present = {
            "exp_avgs": "exp_avg" if momentum == "full" else None,
            "lefts": "exp_avg_left" if momentum == "lowrank" else None,
            "rights": "exp_avg_right" if momentum == "lowrank" else None,
            "exp_avg_sqs": "exp_avg_sq" if second == "element" else None,
            "row_sqs": "exp_avg_sq_row" if second in ("rows", "factored") else None,
            "col_sqs": "exp_avg_sq_col" if second in ("cols", "factored") else None,
        }
        states: dict[str, Any] = {name: bucket.state(key) for name, key in present.items() if key is not None}
        partial_momentum_update_(
            bucket.params,
            bucket.grads,
            bucket.state("step"),
            **states,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            rule=self.rule_for(group),
            **bucket.options(),
        )

    # what it costs

    def table(self) -> str:
        """Return a line for each parameter or slice: name, shape, momentum, second moment, bytes of both; and sums."""
        lines: list[tuple[str, ...]] = [
            ("name", "shape", "momentum", "second moment", "bytes of momentum", "of second")
        ]
        total, sums = 0, [0, 0]
        for group, place, param, identity in self.members():
            meta = stand_in(param)
            total += param.numel()
            for part, block in zip(self.parts_of(meta, group, place), _blocks(group, place), strict=True):
                view = part.of(meta)
                sizes = [0, 0]
                for key, value in self._state(view, block, group).items():
                    sizes[key not in _MOMENTUM] += value.numel() * value.element_size()
                momentum, second = part.rule.split()
                if momentum == "lowrank":
                    momentum = f"rank {self._rank(view, group)}"
                name = f"{identity}{_sliced(block, param)}"
                shape = " x ".join(map(str, view.shape)) or "scalar"
                lines.append((name, shape, momentum, _described(second, block), *map(str, sizes)))
                sums = [a + b for a, b in zip(sums, sizes, strict=True)]
        of_adam = ["", ""] if total == 0 else [f"{100 * size / (4 * total):.2f} %" for size in sums]
        lines += [("total", str(total), "", "", *map(str, sums)), ("", "", "", "of AdamW's", *of_adam)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _blocks(group: Mapping[str, Any], place: int) -> list[Block]:
    return [Block(*each) for each in group[BLOCKS][place]]


def _groups(count: int, size: int) -> int:
    """How many groups of ``size`` (0: all) there are, at least one of what there is."""
    return 0 if count == 0 else 1 if size == 0 else count // size


def _sliced(block: Block, param: Tensor) -> str:
    if block.where is None:
        return ""
    dim, start, length = block.where
    return f"[{', '.join([':'] * dim + [f'{start}:{start + length}'] + [':'] * (param.ndim - dim - 1))}]"


def _described(second: str, block: Block) -> str:
    if second in ("rows", "cols"):
        side = second[:-1]
        return "of all" if block.size == 0 else f"of each {side}" if block.size == 1 else f"of {block.size} {second}"
    return {"element": "of each element", "factored": "rows and columns"}[second]


@lru_cache(maxsize=256)
def starting_rows(rank: int, columns: int) -> Tensor:
    """Orthonormal rows, random but always the same: what a low-rank momentum looks along before it sees a gradient."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(columns, rank, generator=generator)
    return torch.linalg.qr(random)[0].mT.contiguous()
