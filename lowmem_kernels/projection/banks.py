"""Projections on the device: drawn there, once an epoch, and shared by all parameters that can share them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import is_capturing, launching_on, stream_id
from ..pieces import RowPlace
from ..tensors import Tensors, remembered
from .draw import is_shared, key_of, places_of, torch_projection
from .kernels import _projection_kernel
from .rule import Draw, Sides

#: Entries of a program that draws: 2 calls of Philox for each thread of 4 warps.
DRAW_BLOCK, DRAW_WARPS = 1024, 4

_NOTHING_DRAWN = -1

#: What was recorded into CUDA graphs lives as long as the process, since nothing tells when a graph is destroyed.
_captured: list[Bank] = []


class Part(NamedTuple):
    """Which of a parameter's contracted elements are here: the rows of a piece, and how many."""

    place: RowPlace
    rows: int


class Bank:
    """The projection of one number of contracted elements, or of part of them, and one rank: bfloat16 [rank, those]."""

    def __init__(
        self, sides: Sides, source: str, key: int, tag: int, device: torch.device, part: Part | None = None
    ) -> None:
        count = sides.contracted if part is None else part.rows
        self.values = torch.empty(sides.rank, count, dtype=torch.bfloat16, device=device)
        self._source, self._key, self._tag = source, key, tag
        self._place = (None, None, None) if part is None else part.place
        self._drawn = torch.full((), _NOTHING_DRAWN, dtype=torch.int64, device=device)
        self._epoch: int | None = None

    def draw(self, epoch: int | Tensor) -> None:
        """Draw the projection of an epoch, if it is not what there is.

        An epoch that lies on the device is compared there: the launch is in every step, and in every replay.
        """
        known = isinstance(epoch, int)
        if known and epoch == self._epoch:
            return
        rank, contracted = self.values.shape
        if not contracted:
            return
        with launching_on(self.values.device):
            _projection_kernel[(-(-contracted // DRAW_BLOCK), rank)](
                self.values, None if known else self._drawn, epoch, self._key, contracted, self._tag, *self._place,
                SIGNS=self._source == "rademacher", BLOCK=DRAW_BLOCK, num_warps=DRAW_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        if isinstance(epoch, int):
            self._epoch = epoch
            self._drawn.fill_(epoch)
        else:
            self._epoch = None
            self._drawn.copy_(epoch)
        if is_capturing(self.values.device):
            _captured.append(self)


@lru_cache(maxsize=64)
def _shared_bank(
    contracted: int, rank: int, source: str, seed: int, device: torch.device, stream: int, part: Part | None
) -> Bank:
    """What all parameters with as many contracted elements share; it belongs to a stream."""
    sides = Sides(1, 1, contracted, True, rank, True)
    return Bank(sides, source, *key_of(sides, Draw(source, seed), 0), device, part)


def projections_of(
    tensors: Sequence[Tensor], sides: Sequence[Sides], draw: Draw, parts: Sequence[Part | None]
) -> Tensors:
    """Return the drawn projection of each parameter, None where kernels draw it or nothing is projected.

    ``sides`` are those of the whole parameters, and ``parts`` what of their contracted elements is here; None: all.
    """
    device, uids = tensors[0].device, draw.uids_of(len(tensors))
    if draw.source == "torch":
        epoch = int(draw.epoch)

        def make_all() -> Tensors:
            return Tensors([
                _of_part(torch_projection(side, draw.seed + uid + 1, epoch, device), part) if side.projected else None
                for side, uid, part in zip(sides, uids, parts, strict=True)
            ])  # fmt: skip

        return remembered([tensors], ("torch projections", draw.seed, tuple(uids), epoch, tuple(parts)), make_all)

    def make() -> tuple[Tensors, list[Bank]]:
        shared = [side.projected and is_shared(side, draw.source) for side in sides]
        # a graph has its own, which no other launch draws anew
        bank_of = cache(_shared_bank.__wrapped__) if capturing else _shared_bank
        stream = stream_id(device)
        found = [
            bank_of(side.contracted, side.rank, draw.source, draw.seed, device, stream, part) if has else None
            for side, has, part in zip(sides, shared, parts, strict=True)
        ]
        banks = dict.fromkeys(bank for bank in found if bank is not None)
        return Tensors([None if bank is None else bank.values for bank in found]), [*banks]

    capturing = is_capturing(device)
    what = ("banks", tuple(sides), tuple(parts), draw.source, draw.seed, stream_id(device), capturing)
    values, banks = remembered([tensors], what, make)
    for bank in banks:
        bank.draw(draw.epoch)
    return values


def _of_part(projection: Tensor, part: Part | None) -> Tensor:
    return projection if part is None else places_of(projection, *part).contiguous()
