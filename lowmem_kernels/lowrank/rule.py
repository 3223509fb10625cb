"""What tells partial momenta apart: how the low-rank factors follow the gradient, and what is done to the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

SOLVERS = ("power", "gd", "fixed")
CLIPS = ("rms", "elem")

#: Largest rank: a program holds the triangular matrices of one problem, rank x rank, in registers.
MAX_RANK = 64

#: How far a step of "gd" goes towards the least squares solution.
GD_STEP = 0.5


@dataclass(frozen=True)
class MomentumRule:
    """How a low-rank momentum ``M = L R`` is followed, and how the update is corrected and clipped.

    Attributes:
        solver: "power": one block power step a call, from the factors of the last. "gd": one step of scaled gradient
            descent on ``|L R - A|²``, which is half of a power step. "fixed": R stays, and only L moves, but for one
            power step in ``refresh`` calls.
        refresh: calls from one power step to the next with solver="fixed".
        residual_scale: gamma, what the residual is multiplied by. 1: no bias. 0: the residual is dropped.
        update_clip: None; ("rms", d): the update is divided by what its root mean square over the parameter exceeds d
            by; ("elem", c): each element of it is clamped to ±c. In units of the normalized update.

    Raises:
        ValueError: an attribute that is not allowed, by name, with what is.
    """

    solver: str = "power"
    refresh: int = 50
    residual_scale: float = 1.0
    update_clip: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"rule.solver is {self.solver!r}; allowed: {', '.join(map(repr, SOLVERS))}")
        if not isinstance(self.refresh, int) or isinstance(self.refresh, bool) or self.refresh < 1:
            raise ValueError(f"rule.refresh is {self.refresh!r}; allowed: an integer of at least 1")
        if not 0 <= self.residual_scale <= 1:
            raise ValueError(f"rule.residual_scale is {self.residual_scale!r}; allowed: a number in [0, 1]")
        clip = self.update_clip
        if clip is not None and not (
            isinstance(clip, (tuple, list)) and len(clip) == 2 and clip[0] in CLIPS and 0 < clip[1] < math.inf
        ):
            raise ValueError(
                f"rule.update_clip is {clip!r}; allowed: None, ('rms', d) or ('elem', c) with a number > 0"
            )

    @property
    def every(self) -> int:
        """How many calls there are from one power step to the next."""
        return self.refresh if self.solver == "fixed" else 1

    @property
    def damping(self) -> float:
        """How much of the way to the least squares solution a step goes."""
        return GD_STEP if self.solver == "gd" else 1.0

    def clip_of(self, kind: str) -> float | None:
        """Return the bound of ``update_clip`` if it is of this kind."""
        return float(self.update_clip[1]) if self.update_clip is not None and self.update_clip[0] == kind else None
