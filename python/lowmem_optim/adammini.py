"""Adam-mini: Adam with one second moment for each row, head or vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.lowrank import MomentumRule

from .adapm import check_moments
from .blocks import POLICY
from .checks import CommonOptions
from .partial import PartialMomentum


class AdamMini(PartialMomentum):
    """Adam-mini: Adam whose second moment is one number for each group of elements.

    ``m += (1 - b1)(g - m)``, ``v += (1 - b2)(mean of the group's g² - v)``,
    ``p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + lr weight_decay p``

    Groups, by names: the rows of a head for queries and keys, where head_dim is given; single rows of other matrices
    (columns of GPT-2's, which are stored as (inputs, outputs)); all of a vector, but single elements of a bias.

    Args:
        params: (name, parameter) pairs, or groups of them such as `split_params` makes; float32, bfloat16, float16.
        lr: step length, in units of the parameter for each normalized update.
        betas: decay rates (b1, b2) in [0, 1).
        eps: added to the square root, in units of the gradient, > 0.
        weight_decay: decoupled, multiplied by lr.
        head_dim: rows of a head; None: queries and keys have groups of single rows.
        **options: see CommonOptions.

    State, float32: ``exp_avg``; ``exp_avg_sq_row``, ``exp_avg_sq_col`` or ``exp_avg_sq``; ``step``, ``uid``. Weights
    that hold several matrices are cut into slices, as in `AdaPM`. `table()` returns what each parameter has.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More" (arXiv 2406.16793).
    """

    momenta: ClassVar[Mapping[str, str]] = dict.fromkeys(POLICY, "full")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        head_dim: int | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "head_dim": head_dim}
        super().__init__(params, own, options, policy=None)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_moments(options)

    def rule_for(self, group: Mapping[str, Any]) -> MomentumRule:
        return MomentumRule()

    def rank_of(self, group: Mapping[str, Any]) -> int:
        return 0

    def second_moment_of(self, group: Mapping[str, Any]) -> str:
        return "adam-mini"
