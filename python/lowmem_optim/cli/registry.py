"""Optimizers by name, the learning rates they start from, and options given as text."""

import ast
import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import lowmem_optim
from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.naming import arguments_of
from lowmem_optim.partial import PartialMomentum
from lowmem_optim.roles import split_params
from lowmem_optim.routed import RoutedOptimizer

# By name, or by class name, so that lowmem_optim.AdamW and torch.AdamW start equal. The best of a sweep on the default
# task, by its validation loss:
#   AdamW: 5e-4 1.804, 8e-4 1.741, 1.5e-3 1.737, 2e-3 1.734; after 500 steps 1.5e-3 1.808, 3e-3 1.851, 1e-2 2.462
#   Lomo (SGD's update): 0.2 2.316, 0.3 2.298, 0.5 2.289; after 500 steps 0.5 2.319, 1 2.525, 2 2.567, 4 2.756
#   AdaLomo: 0.02 1.728, 0.05 1.667, 0.1 1.804
#   Adafactor without scale_parameter: 1e-3 1.788, 2e-3 1.784, 4e-3 1.833; with it the rule is AdaLomo's: 0.05 1.666
#   SinkGD: 0.02 1.799, 0.04 1.782, 0.08 1.965; with iterations=1 0.04 1.773, 0.08 1.833
#   SWAN: 0.02 1.742, 0.04 1.568, 0.08 1.508
#   AdaPM: 2e-3 1.670, 4e-3 1.657 (rank 4); rank 16 at 4e-3 1.678, with v of rows 1.781; betas (0.9, 0.95), decay 0.1
#   AdamMini: 2e-3 1.880, the same betas and decay
#   APOLLO of rank 32: 4e-3 1.713; with fallback_lr=2e-3 0.01 1.706, 0.02 1.767
#   APOLLOMini: 2e-3 2.079, 3e-3 2.035, 5e-3 2.079, 0.01 2.099, 0.02 2.286
#   MNGD with norms=("row",), iterations=1: 0.04 1.802; as it comes it is SinkGD
# Not swept: TorchAdafactor, which is AdaLomo's rule but for a bound on the rate and the place of eps; CAME.
LEARNING_RATES = {
    "AdamW": 2e-3,
    "Lomo": 0.5,
    "SGD": 0.5,
    "AdaLomo": 0.05,
    "Adafactor": 2e-3,
    "TorchAdafactor": 0.05,
    "torch.Adafactor": 0.05,
    "SinkGD": 0.04,
    "SWAN": 0.08,
    "AdaPM": 4e-3,
    "AdamMini": 2e-3,
    "MNGD": 0.04,
    "APOLLO": 0.01,
    "APOLLOMini": 3e-3,
}

# Arguments without which the rate above is not taken, or not what it says
OPTIONS: dict[str, dict[str, Any]] = {
    "Adafactor": {"relative_step": False, "scale_parameter": False},
    # a quarter of the model's width, as in the paper; 256 would be all of it
    "APOLLO": {"rank": 32, "fallback_lr": 2e-3},
}

# Arguments with a command-line option of their own
NAMED_OPTIONS = {
    "lr": "--lr",
    "weight_decay": "--weight-decay",
    "clip_grad_norm": "--clip-grad-norm",
    "backend": "--backend",
}

# PyTorch's optimizers that cannot train this model, and why
UNSUITABLE = {
    "LBFGS": "it evaluates the loss several times per step",
    "Muon": "it takes matrices only, and the model has vectors too",
    "SparseAdam": "it takes sparse gradients only",
}


@dataclass(frozen=True)
class Choice:
    """An optimizer class, and the name it goes by in tables."""

    name: str
    cls: type[Optimizer]

    @property
    def learning_rate(self) -> float:
        """The rate swept for the default task, else the constructor's own default."""
        own = LEARNING_RATES.get(self.name, LEARNING_RATES.get(self.cls.__name__))
        return inspect.signature(self.cls).parameters["lr"].default if own is None else own

    @property
    def arguments(self) -> set[str]:
        """Names of the constructor's arguments."""
        return arguments_of(self.cls)

    @property
    def can_fuse(self) -> bool:
        """Whether `fuse_backward` takes it."""
        return issubclass(self.cls, LowMemOptimizer)

    def takes(self, option: str) -> bool:
        """Whether the constructor has an argument of this name."""
        return option in self.arguments

    def build(self, model: nn.Module, lr: float, options: dict[str, Any]) -> Optimizer:
        """The optimizer for the model's parameters, with those of the options that it takes.

        One that has other rules for some matrices is told the parameters' roles. Raises ValueError naming the optimizer
        when its constructor rejects an option.
        """
        options = {**OPTIONS.get(self.name, {}), **options}
        return self.construct(model, {"lr": lr, **options})

    def construct(self, model: nn.Module, options: dict[str, Any]) -> Optimizer:
        """As `build`, with the constructor's own defaults where options say nothing."""
        own = {key: value for key, value in options.items() if self.takes(key)}
        roles = issubclass(self.cls, (RoutedOptimizer, PartialMomentum))
        params = split_params(model) if roles else model.named_parameters()
        try:
            return self.cls(params, **own)
        except (TypeError, ValueError, RuntimeError) as error:
            arguments = ", ".join(f"{key}={value!r}" for key, value in own.items())
            raise ValueError(f"{self.name}({arguments}): {error}") from error


def choices() -> dict[str, Choice]:
    """Every optimizer that can be named, by lower-case name: lowmem_optim's, then PyTorch's as `torch.<class>`."""
    own = {name: getattr(lowmem_optim, name) for name in lowmem_optim.__all__}
    torchs = {f"torch.{name}": cls for name, cls in vars(torch.optim).items() if name not in UNSUITABLE}
    return {name.lower(): Choice(name, cls) for name, cls in {**own, **torchs}.items() if _is_optimizer(cls)}


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def find(name: str) -> Choice:
    """The optimizer of this name, in any case and with any hyphens; raises ValueError that suggests near names."""
    known = choices()
    key = name.lower().replace("-", "")
    if key in known:
        return known[key]
    for unsuitable, reason in UNSUITABLE.items():
        if name.lower() == f"torch.{unsuitable.lower()}":
            raise ValueError(f"torch.{unsuitable} cannot train this model: {reason}")
    near = difflib.get_close_matches(name.lower(), known, n=5)
    names = ", ".join(known[key].name for key in near or known)
    raise ValueError(f"no optimizer is named {name!r}; " + (f"did you mean {names}?" if near else f"known: {names}"))


def parse_options(
    pairs: list[str], optimizers: list[Choice], elsewhere: Mapping[str, str] = NAMED_OPTIONS
) -> dict[str, Any]:
    """Options from `key=value` texts; values are Python literals, or text where they are not.

    Raises ValueError for a text without `=`, for a key that none of the optimizers takes, and for one that is set
    ``elsewhere``, by its command-line option.
    """
    options = parse_pairs(pairs)
    for key in options:
        if key in elsewhere:
            raise ValueError(f"{key!r} has an option of its own, {elsewhere[key]}")
        require_taker(key, optimizers)
    return options


def parse_pairs(pairs: list[str]) -> dict[str, Any]:
    """As `parse_options`, of any keys."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not of the form key=value, as in betas=(0.9, 0.95)")
        options[key] = _literal(value)
    return options


def require_taker(key: str, optimizers: list[Choice]) -> None:
    """Raises ValueError, with near names, unless an optimizer's constructor has an argument of this name."""
    if any(optimizer.takes(key) for optimizer in optimizers):
        return
    known = set().union(*(optimizer.arguments for optimizer in optimizers)) - {"params", *NAMED_OPTIONS}
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
    raise ValueError(f"{key!r} is not an argument of {' or '.join(choice.name for choice in optimizers)}; {hint}")


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
