"""Which known rule an optimizer follows, and how its decay, its eps and its shapes are treated."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_kernels.numerics import parity_tolerance

from .inputs import MATRICES, gradients, starts
from .rules import RULES, Rule
from .subject import Subject

STEPS = 5
#: Far above what any default is, so that its place shows; gradients' squares are 0.04 to 9.
LARGE_EPS = 0.1
#: Nothing, wherever it is put, so that rules agree that put it elsewhere.
SMALL_EPS = 1e-30
#: Above 1 / sqrt(t) from the third step on, which bounds the rate of torch.optim.Adafactor.
LARGE_LR = 0.7

Multiples = Mapping[str, float]


def conditions(subject: Subject) -> dict[str, dict[str, Any]]:
    """By name, what is set in each of the runs that a rule has to agree in."""
    common = plain(subject)
    found: dict[str, dict[str, Any]] = {"plain": common, "large lr": {**common, "lr": LARGE_LR}}
    if common:
        found["large eps"] = _eps(subject, LARGE_EPS)
    if subject.takes("weight_decay"):
        found["weight decay"] = {**common, "weight_decay": 0.1}
    return found


def plain(subject: Subject) -> dict[str, Any]:
    """What is set so that only the rule itself shows: an eps that is nothing."""
    return _eps(subject, SMALL_EPS)


def _eps(subject: Subject, value: float) -> dict[str, Any]:
    """The value as the eps that the gradient is divided with, of several the first; {} where there is none."""
    eps = subject.make(subject.params(starts(MATRICES[0]))).param_groups[0].get("eps")
    if eps is None or not subject.takes("eps"):
        return {}
    return {"eps": (value, *eps[1:]) if isinstance(eps, (tuple, list)) else value}


def options_of(subject: Subject, optimizer: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer goes by: what its constructor got or has as defaults, and its first group's options."""
    parameters = inspect.signature(subject.cls).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return {**defaults, **group, **subject.arguments, **overrides}


def multiple(ends: Sequence[Tensor], exact: Sequence[np.ndarray], begins: Sequence[Tensor], steps: int) -> float:
    """The largest distance of a parameter from the oracle's, in units of what float32 allows."""
    worst = 0.0
    for end, right, begin in zip(ends, exact, begins, strict=True):
        target = torch.as_tensor(np.array(right))
        allowed = parity_tolerance(begin, target, steps)
        distance = torch.linalg.vector_norm(end.detach().cpu().double() - target).item()
        ratio = 0.0 if distance == 0 else distance / allowed if allowed else np.inf
        worst = max(worst, np.inf if np.isnan(ratio) else ratio)
    return worst


def distance(
    rule: Rule, subject: Subject, begins: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **overrides: Any
) -> float:
    """How far the subject is from a rule after these gradients, in units of the tolerance."""
    params, optimizer = subject.run(begins, grads, **overrides)
    return _from_rule(rule, params, begins, grads, options_of(subject, optimizer, overrides))


def _from_rule(
    rule: Rule,
    params: Sequence[Tensor],
    begins: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    options: Mapping[str, Any],
    **more: Any,
) -> float:
    own = {**rule.options(options), **more}
    arrays = [begin.double().numpy() for begin in begins]
    given = [[grad.double().numpy() for grad in of_step] for of_step in grads]
    try:
        exact = rule.oracle(arrays, given, [[own] * len(begins) for _ in grads])[0]
    except (KeyError, TypeError, ValueError):
        # options of the same name that mean something else: it is another rule
        return np.inf
    return multiple(params, exact, begins, len(grads))


@dataclass(frozen=True)
class Recognition:
    """What was found.

    distances: by rule and condition, in units of the tolerance.
    places: by place of eps, how far the rule with that place is where eps is large.
    against: the rule that the subject is said to follow, if one was given.
    """

    distances: Mapping[str, Multiples]
    places: Multiples
    against: Rule | None = None

    @property
    def agreeing(self) -> list[Rule]:
        """Rules that the subject agrees with under all conditions."""
        return [rule for rule in RULES if all(each <= 1 for each in self.distances[rule.name].values())]

    @property
    def nearest(self) -> Rule:
        """The rule that was given, or the first that agrees, or else in most conditions, or else the nearest."""

        def badness(rule: Rule) -> tuple[bool, int, float]:
            found = self.distances[rule.name]
            return found["plain"] > 1, sum(each > 1 for each in found.values()), found["plain"]

        return self.against or min(RULES, key=badness)

    @property
    def known(self) -> bool:
        """Whether the nearest rule agrees at least without decay and with a small eps."""
        return self.distances[self.nearest.name]["plain"] <= 1


def recognize(subject: Subject, against: Rule | None = None) -> Recognition:
    """Compares a subject with all rules, under all conditions."""
    begins, grads = starts(*subject.shapes), gradients(*subject.shapes, steps=STEPS)
    distances: dict[str, dict[str, float]] = {rule.name: {} for rule in RULES}
    runs = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # an oracle that does not fit may divide by nothing
        warnings.simplefilter("ignore")
        for condition, overrides in conditions(subject).items():
            params, optimizer = subject.run(begins, grads, **overrides)
            runs[condition] = params, options_of(subject, optimizer, overrides)
            for rule in RULES:
                distances[rule.name][condition] = _from_rule(rule, params, begins, grads, runs[condition][1])
        found = Recognition(distances, {}, against)
        if not found.known or "large eps" not in runs:
            return found
        params, options = runs["large eps"]
        rule = found.nearest
        places = {place: _from_rule(rule, params, begins, grads, options, eps_place=place) for place in rule.eps_places}
    return Recognition(distances, places, against)
