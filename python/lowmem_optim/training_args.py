"""APOLLO from the options by which transformers' Trainer knows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .apollo import APOLLO
from .roles import split_params

#: Keys of optim_args, with the Trainer's defaults; those that are numbers are read as such.
OPTIM_ARGS: dict[str, Any] = {
    "rank": 128,
    "proj": "random",
    "scale_type": "channel",
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "disable_nl": False,
}


def apollo_from_training_args(
    model: nn.Module,
    *,
    optim_target_modules: str | Sequence[str],
    optim_args: str | None = None,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    **options: Any,
) -> APOLLO:
    """Return the APOLLO that fields of these names in transformers' TrainingArguments ask for with "apollo_adamw".

    The weights of the linear layers that ``optim_target_modules`` names are projected, and all other parameters get
    AdamW. Unlike the Trainer's own, it decays weights (those of two or more dimensions, but for normalization layers),
    keeps its state in checkpoints, and refuses keys that it does not know.

    Args:
        model: any module.
        optim_target_modules: parts of names of modules, a regular expression that matches whole names, or
            "all-linear".
        optim_args: "key=value, key=value" with keys of OPTIM_ARGS: "rank=1, scale=128, scale_type=tensor" is
            APOLLO-Mini.
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: of both rules; eps is not corrected for bias
            where matrices are projected.
        **options: further options of `APOLLO`.

    Raises ValueError for keys and values that are not allowed, and for targets that no linear layer has.
    """
    chosen = _parsed(optim_args or "")
    targets = _targets(model, optim_target_modules)
    betas = (adam_beta1, adam_beta2)
    members: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for group in split_params(model):
        for name, param in zip(group["param_names"], group["params"], strict=True):
            is_target = any(param is target for target in targets)
            members.setdefault((is_target, group["role"] != "vector"), []).append((name, param))
    groups = [
        {
            "params": [param for _, param in named],
            "param_names": [name for name, _ in named],
            # what a matrix is not, so that all that is not projected gets the fallback
            "role": "matrix" if is_target else "vector",
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_target, decays), named in members.items()
    ]
    return APOLLO(
        groups, lr=learning_rate, betas=betas, eps=adam_epsilon, fallback_betas=betas, fallback_eps=adam_epsilon,
        **{**chosen, **options},
    )  # fmt: skip


def _parsed(optim_args: str) -> dict[str, Any]:
    chosen = dict(OPTIM_ARGS)
    for pair in filter(None, map(str.strip, optim_args.split(","))):
        key, equals, value = map(str.strip, pair.partition("="))
        if key not in OPTIM_ARGS or not equals:
            raise ValueError(f"optim_args has {pair!r}; allowed: key=value with keys {', '.join(OPTIM_ARGS)}")
        default = OPTIM_ARGS[key]
        try:
            chosen[key] = _BOOLEANS[value.lower()] if isinstance(default, bool) else type(default)(value)
        except (KeyError, ValueError):
            raise ValueError(f"optim_args has {pair!r}; allowed: a value like {key}={default}") from None
    if chosen.pop("proj") != "random":
        raise ValueError("optim_args has a proj that is not 'random'; allowed: proj=random")
    return chosen


_BOOLEANS = {"true": True, "false": False}


def _targets(model: nn.Module, names: str | Sequence[str]) -> list[nn.Parameter]:
    """The weights of linear layers (nn.Linear, and Conv1D of transformers) whose names match."""

    def matches(name: str) -> bool:
        if isinstance(names, str):
            return names.replace("_", "-") == "all-linear" or re.fullmatch(names, name) is not None
        return any(part in name for part in names)

    found = [
        module.weight
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and matches(name)
    ]
    if not found:
        raise ValueError(f"optim_target_modules is {names!r}; allowed: what matches the name of a linear layer")
    return found
