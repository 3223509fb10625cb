"""The rules that an optimizer can agree with, and which of its options say what to them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowmem_kernels.testing import oracles
from lowmem_kernels.testing.oracles import elementwise, factored, lowrank, multinorm, projection

from ..partial import starting_rows


@dataclass(frozen=True)
class Rule:
    """A rule with an oracle.

    name: as of this package's optimizer, where there is one.
    title: what it is, in a sentence.
    oracle: the rule in float64 NumPy.
    defaults: the options it reads besides lr, and what they are for an optimizer that does not have them.
    eps_places: where it can put eps, its own place first; empty: there is one way only, or no eps.
    """

    name: str
    title: str
    oracle: oracles.Oracle
    defaults: Mapping[str, Any]
    eps_places: tuple[str, ...] = ()

    def options(self, of_optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """Its options as an optimizer has them: those of the same name or meaning, and of the same kind."""
        found = {"lr": of_optimizer["lr"]}
        for key, default in self.defaults.items():
            name = key if key in of_optimizer else _SYNONYMS.get(key, key)
            value = of_optimizer.get(name, default)
            found[key] = value if _same_kind(value, default) else default
        return found


#: Names of the same option in the dialects of Adafactor.
_SYNONYMS = {"d": "clip_threshold", "clip_threshold": "d", "beta2_decay": "decay_rate", "decay_rate": "beta2_decay"}


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a value may be meant for a rule with this default: one of three betas is none of two."""
    listed = isinstance(value, (tuple, list))
    if isinstance(default, tuple):
        if listed and all(isinstance(each, str) for each in (*value, *default)):
            return True
        same = listed and len(value) == len(default)
        off = value is None and isinstance(default[0], str)  # a bound of some kind
        return off or (same and all(_same_kind(a, b) for a, b in zip(value, default, strict=True)))
    if default is None:
        return not listed
    return type(value) is type(default) or (isinstance(value, int) and isinstance(default, float))


def _adapm(
    params: Sequence[np.ndarray], grads: Sequence[Sequence[np.ndarray]], options: Sequence[Sequence[Mapping[str, Any]]]
) -> oracles.types.End:
    return oracles.adapm(params, grads, options, lambda rank, n: starting_rows(rank, n).double().numpy())


_CLIP = {"clip_grad_norm": None, "clip_grad_value": None, "weight_decay": 0.0}
_ADALOMO = {k: v for k, v in factored.TRANSFORMERS.items() if k not in ("beta1", "relative_step")} | _CLIP
# of full rank it is Adam, and the tensors are small
_ADAPM = lowrank.ADAPM | {"rank": 4}
_APOLLO = {**multinorm.DEFAULTS, **projection.DEFAULTS}
_FACTORED_EPS, _FLOOR_EPS = factored.FACTORED_EPS, ("floor", "square", "outside", "inside")

#: In the order in which they are named where several agree.
RULES = (
    Rule("AdamW", "Adam with decoupled decay", oracles.adamw, elementwise.ADAM, elementwise.ADAM_EPS),
    Rule(
        "Adam", "Adam with weight_decay * p added to the gradient", oracles.adam, elementwise.ADAM, elementwise.ADAM_EPS
    ),
    Rule("Lomo", "gradient descent, as LOMO and SGD without momentum", oracles.sgd, _CLIP),
    Rule("Adafactor", "Adafactor as in transformers", oracles.adafactor, factored.TRANSFORMERS, _FACTORED_EPS),
    Rule("AdaLomo", "Adafactor in units of the parameter", oracles.adalomo, _ADALOMO, _FACTORED_EPS),
    Rule("TorchAdafactor", "Adafactor as in torch.optim", oracles.torch_adafactor, factored.TORCH, _FLOOR_EPS),
    Rule("CAME", "Adafactor's update as a momentum, over its instability", oracles.came, factored.CAME, _FACTORED_EPS),
    Rule("SinkGD", "rows and columns normalized in turns", oracles.sinkgd, multinorm.DEFAULTS),
    Rule("MNGD", "a sequence of norms", oracles.mngd, multinorm.DEFAULTS),
    Rule("SWAN", "rows standardized, singular values made equal", oracles.swan, multinorm.DEFAULTS | multinorm.SWAN),
    Rule("APOLLO", "rates of channels from a random projection", oracles.apollo, _APOLLO),
    Rule("APOLLOMini", "one rate from a projection of rank 1", oracles.apollo_mini, _APOLLO | projection.MINI),
    Rule("AdaPM", "Adam with low-rank momenta", _adapm, _ADAPM),
    Rule("AdamMini", "Adam with a second moment for each row", oracles.adammini, lowrank.ADAMMINI),
)


def find_rule(name: str) -> Rule:
    """The rule of this name, in any case; raises ValueError that suggests near names."""
    known = {rule.name.lower(): rule for rule in RULES}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {', '.join(known[key].name for key in near)}? " if near else ""
    raise ValueError(f"no rule is named {name!r}; {hint}known: {', '.join(rule.name for rule in RULES)}")
