"""This package's optimizers on this machine: kernels against the torch reference, or that against the oracles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_kernels.dispatch import interpreting, why_not_triton
from lowmem_kernels.numerics import name_of
from lowmem_kernels.testing import SHAPES, make_tensors

from ..naming import line_of
from .recognize import multiple, options_of
from .rules import find_rule
from .subject import Subject

STEPS = 3
#: So large that an update counts for more than the rounding of what it is added to.
OPTIONS: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1}
#: Of `lowmem_kernels.testing.SHAPES`: sizes that fit no block, layouts that are not contiguous, and nothing.
UGLY = ("scalar", "seven", "row", "column", "odd_matrix", "conv_channels_last", "transposed", "misaligned", "empty")
#: The share of bfloat16 elements that may be rounded to the other neighbour: fp32 results are 2**-16 of a spacing
#: apart, and a threshold lies in between for one in 1000 writes of a parameter or a state.
BF16_SHARE = 0.01


@dataclass(frozen=True)
class Check:
    """One line of the self-check.

    optimizer: its name.
    dtype: of parameters and gradients.
    times: the largest difference, in units of the tolerance.
    where: the shape with that difference.
    error: what was raised, if something was.
    """

    optimizer: str
    dtype: str
    times: float
    where: str
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether all differences are within the tolerance."""
        return self.error is None and self.times <= 1


def how(device: str) -> tuple[str, str]:
    """What is compared with what on this device, and as a sentence, why."""
    reason = why_not_triton([torch.empty(1, device=device)])
    if reason is None:
        where = "in Triton's interpreter" if interpreting() else f"on {device}"
        return "triton", f"Triton's kernels {where} against the torch reference on the CPU."
    return "torch", f"Triton's kernels do not run here: {reason} The torch path against float64 oracles."


def self_check(subjects: Sequence[Subject]) -> Iterator[Check]:
    """Yields a line for each optimizer and dtype; the subjects say where. Oracles are compared in float32 only."""
    for subject in subjects:
        backend, _ = how(subject.device)
        for dtype in (torch.float32, torch.bfloat16) if backend == "triton" else (torch.float32,):
            try:
                worst = _against_reference(subject, dtype) if backend == "triton" else _against_oracle(subject)
            except Exception as error:  # a kernel that does not compile is a line of the report
                yield Check(subject.name, name_of(dtype), np.inf, "", line_of(error))
                continue
            where = max(worst, key=lambda name: worst[name])
            yield Check(subject.name, name_of(dtype), worst[where], where)


def _tensors(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters at the start, and their gradients at each step."""
    cases = [case for case in SHAPES if case.name in UGLY]
    pairs = [[make_tensors(case, dtype, 100 * step + i) for i, case in enumerate(cases)] for step in range(STEPS)]
    return [param for param, _ in pairs[0]], [[grad for _, grad in of_step] for of_step in pairs]


def _names() -> list[str]:
    return [case.name for case in SHAPES if case.name in UGLY]


def _against_reference(subject: Subject, dtype: torch.dtype) -> dict[str, float]:
    """By shape, how far the kernels are from the torch reference on the CPU."""
    begins, grads = _tensors(dtype)
    actual, _ = subject.run(begins, grads, dtype, backend="triton", **OPTIONS)
    reference = replace(subject, device="cpu")
    expected = reference.params(begins, dtype)
    optimizer = reference.make(expected, backend="torch", **OPTIONS)
    # what is rounded to the other neighbour once stays as far away when it comes closer to 0
    largest = [begin.abs() for begin in begins]
    for of_step in grads:
        reference.steps(optimizer, expected, [of_step])
        largest = [torch.maximum(size, q.detach().abs()) for size, q in zip(largest, expected, strict=True)]
    ends = [(p.detach().cpu(), q.detach()) for p, q in zip(actual, expected, strict=True)]
    if dtype is torch.float32:
        return {
            name: multiple([p], [q.double().numpy()], [begin], STEPS)
            for name, (p, q), begin in zip(_names(), ends, begins, strict=True)
        }
    # too few elements of each for a share
    p, q = (torch.cat([each.flatten() for each in side]).double() for side in zip(*ends, strict=True))
    sizes = torch.cat([each.flatten() for each in largest]).double()
    share = (p != q).double().mean().item()
    spacings = ((p - q).abs() / (2 * 2**-7 * sizes).clamp(min=1e-30)).nan_to_num(nan=np.inf).max().item()
    return {"share of all elements": share / BF16_SHARE, "two spacings": spacings}


def _against_oracle(subject: Subject) -> dict[str, float]:
    """By shape, how far the torch path in float32 is from the oracle of the optimizer's name."""
    rule = find_rule(subject.cls.__name__)
    begins, grads = _tensors(torch.float32)
    params, optimizer = subject.run(begins, grads, backend="torch", **OPTIONS)
    options = rule.options(options_of(subject, optimizer, OPTIONS))
    exact = rule.oracle(
        [begin.double().numpy() for begin in begins],
        [[grad.double().numpy() for grad in of_step] for of_step in grads],
        [[options] * len(begins) for _ in grads],
    )[0]
    return {
        name: multiple([p], [q], [begin], STEPS)
        for name, p, q, begin in zip(_names(), params, exact, begins, strict=True)
    }
