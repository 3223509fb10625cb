"""Multi-normalization as data: which norms follow each other, and into which reads of the gradient they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NORMS = ("row", "col", "sign", "frobenius")

#: Sums of squares below it, the smallest normal number, count as zero: GPUs take what is smaller for zero.
TINY = 2.0**-126


@dataclass(frozen=True)
class NormRule:
    """What X is made of the gradient, and what momentum there is. Every norm gives X the RMS 1, but for what is zero.

    Attributes:
        norms: half-steps in order, such as ``("row", "col") * 5``. "row" and "col" divide each row or column by its
            RMS, "frobenius" each matrix by its own, "sign" each element by its absolute value.
        scale: factor of the normalized update X, in units of its RMS.
        eps: None masks rows and columns of zeros, so that X does not depend on the gradient's scale. A number bounds
            every norm by eps from below, in units of the gradient, as ports do; for alternating "row" and "col" only.
        row_threshold: rows of the gradient whose norm is below this fraction of the mean norm of all rows become zero.
        momentum: mu; 0 for none.
        nesterov: look ahead by one more step of momentum.
        momentum_after: the momentum is that of X, not of the gradient.
        conv: the rows of a parameter of more than two dimensions are its first dimension, its columns all others; False
            takes it for a stack of matrices over its last two.
    """

    norms: tuple[str, ...] = ("row", "col") * 5
    scale: float = 1.0
    eps: float | None = None
    row_threshold: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    momentum_after: bool = False
    conv: bool = False


class Steps(NamedTuple):
    """Half-steps that do what a sequence of norms does.

    sign: whether the elements' signs are taken first.
    half: "row" and "col" in turns.
    frobenius: whether a division by the RMS of the matrix comes last.
    """

    sign: bool
    half: tuple[str, ...]
    frobenius: bool


def steps_of(norms: tuple[str, ...]) -> Steps:
    """Return the half-steps that are left of ``norms``.

    What comes before a sign does not change it. A norm twice in a row is idempotent. A scale goes at the next norm.
    """
    sign = "sign" in norms
    last = norms[len(norms) - norms[::-1].index("sign") :] if sign else norms
    frobenius = bool(last) and last[-1] == "frobenius"
    half: list[str] = []
    for norm in last:
        if norm != "frobenius" and half[-1:] != [norm]:
            half.append(norm)
    return Steps(sign, tuple(half), frobenius)


def keeps_elements(rule: NormRule) -> bool:
    """Say whether a NaN stops only what it reaches: a single norm of lines or elements has no sum over all of them."""
    steps = steps_of(rule.norms)
    return len(steps.half) <= 1 and not steps.frobenius and not rule.row_threshold


class Sweep(NamedTuple):
    """One read of the gradient before the update is written.

    line: whether each line (a row, or in the other orientation a column) is divided by its RMS.
    sums: what is summed up of the result: "norms" of all lines for the threshold, "cross" sums of the lines' places,
        or the "total".
    """

    line: bool
    sums: str


def sweeps_of(rule: NormRule, line: str) -> tuple[tuple[Sweep, ...], bool]:
    """Return the reads before the last one, and whether the last, which writes, divides the lines by their RMS.

    ``line`` is "row" or "col": what is at hand as a whole in one read. A line's half-step needs no read of its own
    where the other's follows. ``("row", "col") * L`` takes L + 1 reads in either orientation.
    """
    steps = steps_of(rule.norms)
    sweeps = [Sweep(False, "norms")] if rule.row_threshold else []
    pending = False
    for half in steps.half:
        if half == line:
            pending = True
        else:
            sweeps.append(Sweep(pending, "cross"))
            pending = False
    if steps.frobenius:
        sweeps.append(Sweep(pending, "total"))
        pending = False
    return tuple(sweeps), pending
