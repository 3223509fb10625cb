"""Every verb with what it takes, ready to be called on tensors of given shapes: for reports and profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..elementwise import adamw_, grad_stats, scaled_update_
from ..factored import FactoredRule, confidence_update_, factored_update_
from ..multinorm import NormRule, sinkhorn_update_
from ..multinorm.schedule import route_of
from ..options import Rounding
from ..projection import ApolloRule, Draw, apollo_update_
from ..projection.rule import moment_shape, norm_shape, sides_of
from ..schedules import Geometry
from .cases import bytes_moved, cached_bytes, moment_bytes

_LR = {"lr": 1e-3, "weight_decay": 0.01}
_EPS32 = torch.finfo(torch.float32).eps
_CAME: dict[str, Any] = {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "clip_threshold": 1.0}
#: A gradient of this size makes torch's floor under V felt.
_TINY_GRAD = 1e-6


@dataclass(frozen=True)
class VerbCall:
    """One call of a verb on tensors that it may be repeated on.

    tensors: the lists that the verb takes, by name, without those that it does not read or write.
    run: makes the call.
    formula: (read, written) bytes that the call requests, without tables, factors and partial sums.
    least: the sum of what is left of these if what is read a second time at once comes from a cache.
    """

    tensors: Mapping[str, Sequence[Tensor | None]]
    run: Callable[[], object]
    formula: tuple[int, int]
    least: int


@dataclass(frozen=True)
class _Verb:
    formula: str  # of `bytes_moved`
    rule: FactoredRule | NormRule | ApolloRule | None = None
    narrow_state: bool = False
    carried: bool = False
    grad: float = 1e-3


_SCALED = FactoredRule()
_UNSCALED = FactoredRule(scale_parameter=False)
_FLOOR = FactoredRule(eps=(_EPS32, 1e-3), eps_floor=True, scale_parameter=False)
_VERBS = {
    "adamw": _Verb("adamw"),
    "adamw, state as p": _Verb("adamw", narrow_state=True),
    "scaled_update": _Verb("scaled_update"),
    "grad_stats": _Verb("grad_stats"),
    "adafactor, RMS(p) carried": _Verb("factored", _SCALED, carried=True),
    "adafactor, RMS(p) read": _Verb("factored_scaled", _SCALED),
    "adafactor, momentum": _Verb("factored", FactoredRule(scale_parameter=False, beta1=0.9)),
    "adafactor, floor not felt": _Verb("factored", _FLOOR),
    "adafactor, floor felt": _Verb("factored_floor", _FLOOR, grad=_TINY_GRAD),
    "sinkgd": _Verb("sinkgd", NormRule(scale=0.05)),
    "sinkgd, one iteration": _Verb("sinkgd_once", NormRule(("row", "col"), scale=0.05)),
    "rows normalized": _Verb("one_sided", NormRule(("row",), scale=0.05)),
    "table": _Verb("table", NormRule(("row", "col") * 5 + ("row",), 0.18, None, 1e-3, momentum=0.9, nesterov=True)),
    "apollo": _Verb("apollo", ApolloRule()),
    "apollo-mini": _Verb("apollo", ApolloRule(1, "tensor", 128.0)),
    "came": _Verb("confidence"),
    "came, state as p": _Verb("confidence", narrow_state=True),
}

#: Names that `make_call` takes.
VERBS = tuple(_VERBS)


def make_call(
    name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu", backend: str = "auto"
) -> VerbCall:
    """Return a call of a verb on new parameters of these shapes, with states as of a run under way.

    Values are the same for the same arguments, and bfloat16 is rounded stochastically. Raises ValueError for a name
    that is not in `VERBS`.
    """
    if name not in _VERBS:
        raise ValueError(f"verb is {name!r}; allowed: {', '.join(map(repr, VERBS))}")
    verb = _VERBS[name]
    tensors = _tensors(verb, shapes, dtype, device)
    state = (dtype if verb.narrow_state else torch.float32).itemsize if _has_momentum(verb) else 0
    read = written = cached = 0
    for shape in shapes:
        numel, rule = prod(shape), verb.formula
        if len(shape) < 2 and rule.startswith(("factored", "confidence")):
            # RMS(p) needs p whatever its shape, and a floor under a V that is kept in full needs no further look
            read += numel * dtype.itemsize * (rule == "factored_scaled")
            rule = f"{rule.partition('_')[0]}_vector"
        if isinstance(verb.rule, NormRule) and route_of(Geometry(shape, None), True, verb.rule).whole:
            rule = "held"
        moved = bytes_moved(rule, numel, dtype.itemsize, state)
        read, written = read + moved[0], written + moved[1]
        if isinstance(verb.rule, ApolloRule):
            sides = sides_of(shape, verb.rule.rank, verb.rule.proj_type, verb.rule.conv)
            channels = sides.matrices * sides.channels
            moments = moment_bytes(channels, sides.contracted, verb.rule.rank, dtype.itemsize)
            read, written = read + moments[0], written + moments[1]
        cached += cached_bytes(rule, numel, dtype.itemsize)
    return VerbCall(tensors, _caller(verb, tensors, dtype, backend), (read, written), read + written - cached)


def _has_momentum(verb: _Verb) -> bool:
    if verb.rule is None or isinstance(verb.rule, ApolloRule):
        return verb.formula in ("adamw", "confidence")
    return bool(verb.rule.momentum if isinstance(verb.rule, NormRule) else verb.rule.beta1)


def _tensors(
    verb: _Verb, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str
) -> dict[str, Sequence[Tensor | None]]:
    generator = torch.Generator().manual_seed(0)

    def random(scale: float, kind: torch.dtype) -> list[Tensor]:
        return [(scale * torch.randn(shape, generator=generator)).to(device, kind) for shape in shapes]

    def full(value: float, sizes: Sequence[tuple[int, ...] | None]) -> list[Tensor | None]:
        return [None if size is None else torch.full(size, value, device=device) for size in sizes]

    grads = random(verb.grad, dtype)
    if verb.formula == "grad_stats":
        return {"grads": grads}
    params = random(0.02, dtype)
    tensors: dict[str, Sequence[Tensor | None]] = {"params": params, "grads": grads}
    tensors["steps"] = full(3.0, [()] * len(shapes))
    if isinstance(verb.rule, ApolloRule):
        moments = [moment_shape(shape, verb.rule) for shape in shapes]
        return tensors | {
            "exp_avgs": full(verb.grad, moments),
            "exp_avg_sqs": full(verb.grad**2, moments),
            "norms": full(1.0, [norm_shape(shape, verb.rule) for shape in shapes]),
            "epochs": full(1.0, [()] * len(shapes)),
        }
    if isinstance(verb.rule, NormRule):
        return tensors | ({"exp_avgs": random(verb.grad, torch.float32)} if verb.rule.momentum else {})
    if verb.formula == "scaled_update":
        return tensors
    state = dtype if verb.narrow_state else torch.float32
    if verb.formula == "adamw":
        return tensors | {
            "exp_avgs": random(verb.grad, state),
            "exp_avg_sqs": [torch.full(shape, verb.grad**2, dtype=state, device=device) for shape in shapes],
        }
    matrix = [len(shape) > 1 for shape in shapes]
    rows = [shape[:-1] if factored else shape for shape, factored in zip(shapes, matrix, strict=True)]
    cols = [(*shape[:-2], shape[-1]) if factored else None for shape, factored in zip(shapes, matrix, strict=True)]
    tensors |= {"rows": full(verb.grad**2, rows), "cols": full(verb.grad**2, cols)}
    if verb.rule is None:
        res_rows = [row if factored else None for row, factored in zip(rows, matrix, strict=True)]
        return tensors | {"exp_avgs": random(1.0, state), "res_rows": full(1.0, res_rows), "res_cols": full(1.0, cols)}
    if verb.rule.beta1 is not None:
        tensors["exp_avgs"] = random(1e-3, state)
    if verb.carried:
        tensors["param_sums"] = [param.float().square().sum() for param in params]
    return tensors


def _caller(verb: _Verb, tensors: dict[str, Any], dtype: torch.dtype, backend: str) -> Callable[[], object]:
    if verb.formula == "grad_stats":
        return lambda: grad_stats(tensors["grads"], backend=backend)
    options: dict[str, Any] = {
        **_LR, "backend": backend,
        "rounding": Rounding(dtype is torch.bfloat16, seed=0, uids=list(range(len(tensors["params"])))),
    }  # fmt: skip
    if verb.formula == "adamw":
        return lambda: adamw_(**tensors, betas=(0.9, 0.999), eps=1e-8, **options)
    if verb.formula == "scaled_update":
        return lambda: scaled_update_(**tensors, **options)
    if verb.rule is None:
        return lambda: confidence_update_(**tensors, **_CAME, **options)
    rule = verb.rule
    if isinstance(rule, ApolloRule):
        return lambda: apollo_update_(**tensors, rule=rule, draw=Draw(), **options)
    if isinstance(rule, NormRule):
        return lambda: sinkhorn_update_(**tensors, rule=rule, **options)
    return lambda: factored_update_(**tensors, rule=rule, **options)
