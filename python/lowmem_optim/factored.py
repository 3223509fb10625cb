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
from lowmem_kernels.tensors import Tensors

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
        self._places: dict[Tensor, tuple[ParamSums, int]] = {}
        super().__init__(params, own, common)

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self._places = {}

    def rule(self, group: Mapping[str, Any]) -> FactoredRule:
        """Return the dialect that the options of a group ask for."""
        raise NotImplementedError

    def rates(self, group: Mapping[str, Any]) -> tuple[float | Tensor, float]:
        """Return lr and weight_decay as the rule takes them."""
        return group["lr"], group["weight_decay"]

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return new_second_moment(param)

    def takes_pieces(self, bucket: Bucket) -> bool:
        # with a floor under V, another read of the gradient may be needed in some processes only
        return bucket.pieces() is not None and not self.rule(bucket.group).eps_floor

    def update(self, bucket: Bucket) -> None:
        rule, (lr, weight_decay) = self.rule(bucket.group), self.rates(bucket.group)
        # a captured graph is replayed without Python, where nobody sees that a parameter has changed
        carried = None
        if rule.scale_parameter and bucket.lasts and not bucket.group["capturable"]:
            carried = bucket.kept("param_sums", lambda params: ParamSums(params, self._places))
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
            param_sums=None if carried is None else carried.now(),
            pieces=bucket.pieces(),
            **bucket.options(),
        )
        if carried is not None:
            carried.keep()


class ParamSums:
    """The sum of p² of each parameter of a list as the last step left it, so that the next need not read p for RMS(p).

    It is NaN, unknown, for a parameter that something else has written or moved since. Writes through ``.data`` do not
    count as such: autograd does not see them either, and RMS(p) is then one step old for one step.

    ``places`` says where a parameter's sum was last, in which list and at which place: a list takes over what it can.
    """

    def __init__(self, params: Tensors, places: dict[Tensor, tuple[ParamSums, int]]) -> None:
        self._params = params
        self._addresses = [param.data_ptr() for param in params]
        self._versions = self._now()
        sums = list(torch.full((len(params),), torch.nan, dtype=torch.float32, device=params[0].device).unbind())
        for i, param in enumerate(params):
            last, k = places.get(param, (self, i))
            if last is not self and last._addresses[k] == self._addresses[i]:
                sums[i], self._versions[i] = last._sums[k], last._versions[k]
        self._sums: Tensors = Tensors(sums)
        places.update((param, (self, i)) for i, param in enumerate(params))

    def now(self) -> Tensors:
        """Return the 0-d tensors, for a verb to read and to write."""
        now = self._now()
        if now != self._versions:
            for total, old, new in zip(self._sums, self._versions, now, strict=True):
                if old != new:
                    total.fill_(torch.nan)
        return self._sums

    def keep(self) -> None:
        """Take parameters as they are now for what the sums belong to: right after the verb has written both."""
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [param._version for param in self._params]


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


def second_moments(bucket: Bucket) -> tuple[Tensors, Tensors]:
    """Return the lists ``rows`` and ``cols`` of the factored verbs."""
    return bucket.state("exp_avg_sq_row", otherwise="exp_avg_sq"), bucket.state("exp_avg_sq_col")


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
