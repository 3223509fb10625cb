"""What optimizers with factored second moments share: state, options, and RMS(p) carried from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowmem_kernels.factored import FactoredRule, factored_update_

from .base import LowMemOptimizer, StateDict
from .buckets import Bucket
from .checkpoint import Foreign
from .checks import CommonOptions, check_number


class FactoredOptimizer(LowMemOptimizer):
    """Base of Adafactor in its dialects: a subclass says what its options may be and which rule they make.

    A parameter of two or more dimensions is a stack of matrices n x m over its last two. Its second moment is
    ``exp_avg_sq_row`` [..., n] and ``exp_avg_sq_col`` [..., m]; that of one of fewer is ``exp_avg_sq``, of its shape.
    """

    foreign = Foreign(
        {
            "RMS": None,  # transformers and came_pytorch keep it, and never read it
            "row_var": "exp_avg_sq_row",
            "col_var": "exp_avg_sq_col",
            "variance": "exp_avg_sq",
        }
    )

    def __init__(self, params: ParamsT, own: dict[str, Any], common: CommonOptions) -> None:
        self._param_sums = ParamSums()
        super().__init__(params, own, common)

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self._param_sums = ParamSums()

    def rule(self, group: Mapping[str, Any]) -> FactoredRule:
        """Return the dialect that the options of a group ask for."""
        raise NotImplementedError

    def rates(self, group: Mapping[str, Any]) -> tuple[float | Tensor, float]:
        """Return lr and weight_decay as the rule takes them."""
        return group["lr"], group["weight_decay"]

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return new_second_moment(param)

    def update(self, bucket: Bucket) -> None:
        rule, (lr, weight_decay) = self.rule(bucket.group), self.rates(bucket.group)
        # a captured graph is replayed without Python, where nobody sees that a parameter has changed
        carried = rule.scale_parameter and not bucket.group["capturable"]
        rows, cols = second_moments(bucket)
        factored_update_(
            bucket.params,
            bucket.grads,
            rows,
            cols,
            bucket.state("step"),
            lr=lr,
            weight_decay=weight_decay,
            rule=rule,
            exp_avgs=None if rule.beta1 is None else bucket.state("exp_avg"),
            param_sums=self._param_sums.of(bucket.params) if carried else None,
            **bucket.options(),
        )
        if carried:
            self._param_sums.keep(bucket.params)


class ParamSums:
    """The sum of p² of each parameter as the last step left it, so that the next one need not read p for RMS(p).

    It is NaN, unknown, for a parameter that something else has written or moved since. Writes through ``.data`` do not
    count as such: autograd does not see them either, and RMS(p) is then one step old for one step.
    """

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._seen: dict[Tensor, tuple[int, int]] = {}

    def of(self, params: list[Tensor]) -> list[Tensor]:
        """Return the 0-d tensors of parameters on one device, for a verb to read and to write."""
        changed = [param for param in params if self._seen.get(param) != _version(param)]
        if changed:
            # one allocation for all, and none in the steady state
            unknown = torch.full((len(changed),), torch.nan, dtype=torch.float32, device=changed[0].device)
            self._sums.update(zip(changed, unknown.unbind(), strict=True))
        return [self._sums[param] for param in params]

    def keep(self, params: list[Tensor]) -> None:
        """Take parameters as they are now for what the sums belong to: right after the verb has written both."""
        self._seen.update((param, _version(param)) for param in params)


def _version(param: Tensor) -> tuple[int, int]:
    return param.data_ptr(), param._version


def new_second_moment(param: Tensor) -> dict[str, Tensor]:
    """Return zeros for the second moment: two factors for two or more dimensions, all of it for fewer."""
    if param.ndim >= 2:
        return new_factors(param, "exp_avg_sq")
    return {"exp_avg_sq": torch.zeros(param.shape, dtype=torch.float32, device=param.device)}


def new_factors(param: Tensor, prefix: str) -> dict[str, Tensor]:
    """Return zeros for the row and the column factor of a parameter of two or more dimensions."""
    shapes = {f"{prefix}_row": param.shape[:-1], f"{prefix}_col": param.shape[:-2] + param.shape[-1:]}
    return {key: torch.zeros(shape, dtype=torch.float32, device=param.device) for key, shape in shapes.items()}


def new_momentum(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return zeros for ``exp_avg``, in the dtype that state_dtype says."""
    dtype = param.dtype if group["state_dtype"] == "param" else torch.float32
    return {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)}


def second_moments(bucket: Bucket) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the lists ``rows`` and ``cols`` of the factored verbs."""
    rows = [state["exp_avg_sq"] if "exp_avg_sq" in state else state["exp_avg_sq_row"] for state in bucket.states]
    return rows, bucket.optional_state("exp_avg_sq_col")


def check_eps(eps: Any) -> None:
    """Raise ValueError unless ``eps`` are two numbers >= 0."""
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise ValueError(f"eps is {eps!r}; allowed: 2 numbers >= 0")
    for i, value in enumerate(eps):
        check_number(f"eps[{i}]", value)


def check_decay_rate(name: str, value: Any) -> None:
    """Raise ValueError unless ``value``, the exponent of ``1 - t**value``, is a number <= 0."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not -math.inf < value <= 0:
        raise ValueError(f"{name} is {value!r}; allowed: a finite number <= 0")
