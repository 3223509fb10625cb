"""Optimizers whose own rule is for matrices: which parameters it updates, and which a fallback does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import LowMemOptimizer, StateDict
from .buckets import OWN_RULE, Bucket
from .checks import COMMON_DEFAULTS, CommonOptions, check_betas, check_choice, check_number
from .fallbacks import FALLBACKS, fallback_update_, new_fallback_state
from .roles import ROLES


class RoutedOptions(CommonOptions, total=False):
    """Keyword arguments of every optimizer whose own rule is for matrices, for all parameters or in a group.

    Attributes:
        role: what the parameters are: "matrix", "embedding", "head" or "vector", as `split_params` says for each group.
            None: those of two dimensions are matrices, and all others vectors. Only matrices get the optimizer's own
            rule.
        stacks: what a matrix of more than two dimensions is. None: a vector. "batched": a stack of matrices over its
            last two dimensions, such as experts. "conv": one matrix, whose columns are all dimensions but the first.
        fallback: what all others get. "adamw", "adafactor" (with factored second moments, not relative to the
            parameter) or "table" (a momentum, normalized in rows and columns; a vector is one row).
        fallback_lr: its rate, as one would give it to AdamW, where lr is as it was at construction; schedulers of lr
            act on both alike. None: lr times what the optimizer's own rule scales its updates by.
        fallback_betas, fallback_eps: of "adamw".
    """

    role: str | None
    stacks: str | None
    fallback: str
    fallback_lr: float | None
    fallback_betas: tuple[float, float]
    fallback_eps: float


ROUTED_DEFAULTS: RoutedOptions = {
    "role": None,
    "stacks": None,
    "fallback": "adamw",
    "fallback_lr": None,
    "fallback_betas": (0.9, 0.999),
    "fallback_eps": 1e-8,
}

# the key of a group under which it keeps the lr that its fallback_lr goes with
LR_AT_START = "lr_at_start"


class RoutedOptimizer(LowMemOptimizer):
    """Base class: a subclass implements `new_matrix_state` and `update_matrices` for what its own rule updates.

    It has a weight_decay among its options, which the fallback multiplies by its own rate.
    """

    common_defaults: ClassVar[Mapping[str, Any]] = {**COMMON_DEFAULTS, **ROUTED_DEFAULTS}

    # what a subclass says

    def fallback_scale(self, group: Mapping[str, Any]) -> float:
        """Return what lr is multiplied by for the fallback where there is no fallback_lr."""
        return 1.0

    def new_matrix_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state tensors of a matrix before its first update, apart from ``step``."""
        raise NotImplementedError

    def update_matrices(self, bucket: Bucket) -> None:
        """Update the bucket's parameters, which are all matrices, and their states, in place, once."""
        raise NotImplementedError

    # routing

    def rule_of(self, param: Tensor, group: Mapping[str, Any]) -> str:
        """Return OWN_RULE, or which of FALLBACKS updates a parameter."""
        is_matrix = param.ndim == 2 or (param.ndim > 2 and group["stacks"] is not None)
        fallback: str = group["fallback"]
        return OWN_RULE if is_matrix and group["role"] in (None, "matrix") else fallback

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        rule = self.rule_of(param, group)
        return self.new_matrix_state(param, group) if rule == OWN_RULE else new_fallback_state(rule, param)

    def takes_pieces(self, bucket: Bucket) -> bool:
        if bucket.rule == OWN_RULE:
            return self.takes_pieces_of_matrices(bucket)
        return bucket.rule == "adamw" or bucket.pieces() is not None

    def takes_pieces_of_matrices(self, bucket: Bucket) -> bool:
        """Say whether `update_matrices` takes pieces; see `takes_pieces`."""
        return False

    def update(self, bucket: Bucket) -> None:
        if bucket.rule == OWN_RULE:
            self.update_matrices(bucket)
        else:
            fallback_update_(bucket, self.fallback_rate(bucket.group))

    def fallback_rate(self, group: Mapping[str, Any]) -> float | Tensor:
        """Return the fallback's lr, which goes with the group's: no scheduler knows of fallback_lr."""
        lr: float | Tensor = group["lr"]
        if group["fallback_lr"] is None:
            return lr * self.fallback_scale(group)
        return lr * (group["fallback_lr"] / group[LR_AT_START])

    # options

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_choice("role", options["role"], (None, *ROLES))
        check_choice("stacks", options["stacks"], (None, "batched", "conv"))
        check_choice("fallback", options["fallback"], FALLBACKS)
        if options["fallback_lr"] is not None:
            check_number("fallback_lr", options["fallback_lr"])
        check_betas(options["fallback_betas"], 2, name="fallback_betas")
        check_number("fallback_eps", options["fallback_eps"], positive=True)

    def complete_group(self, group: dict[str, Any]) -> None:
        if group["fallback_lr"] is not None and group["lr"] == 0:
            raise ValueError(f"lr is {group['lr']}; allowed: > 0, since fallback_lr goes with it")
        group.setdefault(LR_AT_START, float(group["lr"]))

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault(LR_AT_START, float(self.defaults["lr"]))
