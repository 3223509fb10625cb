"""AdaPM: momentum only where it helps. Reconstructed from what is published of it, see docs/optimizers/adapm.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lowmem_kernels.lowrank import MAX_RANK, MomentumRule

from .blocks import SECOND_MOMENTS, Policy
from .checks import COMMON_DEFAULTS, CommonOptions, check_betas, check_choice, check_number
from .partial import PartialMomentum


class AdaPMOptions(CommonOptions, total=False):
    """Keyword arguments of AdaPM for all parameters or in a group, besides the common ones.

    Attributes:
        solver: how the factors of a low-rank momentum follow: "power" (a block power step), "gd" (half of one, which is
            a step of scaled gradient descent) or "fixed" (R stays for ``refresh`` steps; a read of the gradient less).
        refresh: steps from one power step to the next with solver="fixed".
        residual_scale: what of the momentum's residual is added back, in [0, 1]; 1: no bias. 0 drops it.
        head_dim: rows of a head. With second_moment="adam-mini" queries and keys have a second moment for each head;
            None: for each row.
    """

    solver: str
    refresh: int
    residual_scale: float
    head_dim: int | None


class AdaPM(PartialMomentum):
    """AdaPM: Adam with a momentum for some blocks, a low-rank one for most, and none for the rest. A reconstruction.

    Of a block with gradient g, U is g itself ("none"), ``m / (1 - b1^t)`` ("full"), or ("lowrank"), with ``A = b1 L R +
    (1 - b1) g``, factors ``L R ~ A`` of rank r and the residual ``A - L R``:

    ``U = L R / (1 - b1^t) + residual_scale (A - L R) / (1 - b1)``,
    ``p -= lr (clip(U / (sqrt(v / (1 - b2^t)) + eps)) + weight_decay p)``

    Args:
        params: (name, parameter) pairs, or groups of them such as `split_params` makes; float32, bfloat16, float16.
            Blocks are told by names and shapes: embeddings and attention outputs have no momentum, queries, keys, MLPs
            and an output layer of its own a low-rank one, values, vectors and all that is unknown a full one. Weights
            that hold several matrices (GPT-2's c_attn, qkv_proj, gate_up_proj) are cut into slices.
        lr: step length, in units of the parameter for each normalized update.
        rank: of the low-rank momenta, 0 (none) to 64; smaller where a matrix is.
        second_moment: "adam": v of each element. "adam-mini": v of each row, of each head (head_dim), of all of a
            vector. "factored": v of rows and columns.
        betas: decay rates (b1, b2) in [0, 1).
        eps: added to the square root, in units of the gradient, > 0.
        weight_decay: decoupled, multiplied by lr.
        update_clip: ("rms", d), ("elem", c) or None: bound on the root mean square of a block's normalized update, or
            on each of its elements.
        policy: a function of (name, parameter) to "none", "lowrank" or "full", or to a list of (slice, one of these);
            a slice is of the first dimension, or a tuple of slices. Or one of these for all matrices. None: by names.
            A group may have its own. What it said is kept and saved, the function is not.
        **options: see AdaPMOptions.

    State, float32: ``exp_avg``, or ``exp_avg_left`` [m, r] and ``exp_avg_right`` [r, n]; ``exp_avg_sq``,
    ``exp_avg_sq_row``, ``exp_avg_sq_col``; ``step``, ``uid``. Keys of slices after the first end in ".1", ".2", ....
    Matrices of three dimensions are stacks. `table()` returns what each parameter has and costs.

    Source: Zhang, Liu and Fang, arXiv 2510.09103, as far as it could be read; second moments: arXiv 2406.16793 and
    1804.04235.
    """

    common_defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON_DEFAULTS,
        "solver": "power",
        "refresh": 50,
        "residual_scale": 1.0,
        "head_dim": None,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rank: int = 16,
        second_moment: str = "adam",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        update_clip: tuple[str, float] | None = ("elem", 3.0),
        policy: Policy | str | None = None,
        **options: Unpack[AdaPMOptions],
    ) -> None:
        own = {
            "lr": lr,
            "rank": rank,
            "second_moment": second_moment,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_clip": update_clip,
        }
        super().__init__(params, own, options, policy)

    def check_options(self, options: Mapping[str, Any]) -> None:
        rank = options["rank"]
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= MAX_RANK:
            raise ValueError(f"rank is {rank!r}; allowed: an integer from 0 to {MAX_RANK}")
        check_choice("second_moment", options["second_moment"], SECOND_MOMENTS)
        check_moments(options)
        check_number("residual_scale", options["residual_scale"])
        try:
            self.rule_for(options)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("rule.")) from None

    def rule_for(self, group: Mapping[str, Any]) -> MomentumRule:
        return MomentumRule(group["solver"], group["refresh"], group["residual_scale"], group["update_clip"])

    def rank_of(self, group: Mapping[str, Any]) -> int:
        rank: int = group["rank"]
        return rank

    def second_moment_of(self, group: Mapping[str, Any]) -> str:
        second: str = group["second_moment"]
        return second


def check_moments(options: Mapping[str, Any]) -> None:
    """Raise ValueError for betas, eps, weight_decay or head_dim that are not allowed."""
    check_betas(options["betas"], 2)
    check_number("eps", options["eps"], positive=True)
    check_number("weight_decay", options["weight_decay"])
    head = options["head_dim"]
    if head is not None and (not isinstance(head, int) or isinstance(head, bool) or head < 1):
        raise ValueError(f"head_dim is {head!r}; allowed: None or an integer of at least 1")
