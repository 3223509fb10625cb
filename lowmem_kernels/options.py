"""What every verb that writes parameters shares: how the gradient is read, and how results are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .rounding import tensor_key


@dataclass(frozen=True)
class GradTransform:
    """How a gradient is read: ``g = clamp(±inv_scale * grad, ±clip_value) * clip_coef``, in fp32, in that order.

    Tensors are 0-d fp32 on the gradients' device, so that nothing waits for the host.

    Attributes:
        inv_scale: reciprocal of the loss scale (GradScaler); None is 1.
        clip_value: bound on the absolute value of an element, in units of the unscaled gradient; None is no bound.
        clip_coef: factor from a clipped global norm, normally in [0, 1]; None is 1.
        maximize: negate the gradient.
        found_inf: where it is not 0 nothing is written at all, not even step counters (GradScaler's meaning).
        skip_nonfinite: an element whose unscaled or transformed gradient is NaN or Inf keeps its parameter and state;
            with rules that sum over a parameter, the whole parameter does.
        skipped: 0-d int64 tensor to which the number of elements, or of parameters, so kept is added.
    """

    inv_scale: Tensor | None = None
    clip_value: float | None = None
    clip_coef: Tensor | None = None
    maximize: bool = False
    found_inf: Tensor | None = None
    skip_nonfinite: bool = True
    skipped: Tensor | None = None


@dataclass(frozen=True)
class Rounding:
    """How results are rounded to the dtype they are stored in: once, to nearest, or stochastically where bfloat16.

    Attributes:
        stochastic: round bfloat16 results stochastically (see rounding.py); other dtypes round to nearest.
        seed: the run's seed, any 64-bit integer.
        uids: one 64-bit integer for each parameter; its noise depends on it and on its step. None: 0, 1, 2, ...
    """

    stochastic: bool = False
    seed: int = 0
    uids: Sequence[int] | None = None

    def keys(self, count: int) -> tuple[int, ...]:
        """Return the 32-bit noise keys of ``count`` parameters. Raises ValueError when ``uids`` has another length."""
        uids = range(count) if self.uids is None else self.uids
        if len(uids) != count:
            raise ValueError(f"rounding.uids has {len(uids)} entries; allowed: {count}, one for each parameter")
        return _keys(self.seed, tuple(uids))


@lru_cache(maxsize=64)
def _keys(seed: int, uids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([tensor_key(seed, uid) for uid in uids])
