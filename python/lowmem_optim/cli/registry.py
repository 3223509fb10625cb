"""Optimizers by name, what they start from, and options given as text."""

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
from lowmem_optim.cli.defaults import CONSTRUCTOR, DEFAULTS, Default
from lowmem_optim.naming import arguments_of
from lowmem_optim.partial import PartialMomentum
from lowmem_optim.roles import split_params
from lowmem_optim.routed import RoutedOptimizer

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
    """An optimizer class, the name it goes by in tables, and the values of a sweep that this one is for."""

    name: str
    cls: type[Optimizer]
    swept: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The name with the values of the sweep, which tells runs apart."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.swept)])

    @property
    def default(self) -> Default:
        """What it starts from unless the user says otherwise."""
        # by class name as well, so that lowmem_optim.AdamW and torch.AdamW start equal
        found = DEFAULTS.get(self.name, DEFAULTS.get(self.cls.__name__))
        return found or Default(inspect.signature(self.cls).parameters["lr"].default, CONSTRUCTOR)

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
        return self.construct(model, {"lr": lr, **self.default.options, **options, **dict(self.swept)})

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


def parse_sweeps(pairs: list[str], optimizers: list[Choice]) -> dict[str, tuple[Any, ...]]:
    """Values of at most two arguments from `key=value,value,...` texts, as in `lr=1e-3,2e-3` or `fallback=adamw,lomo`.

    Raises ValueError for a text of another form, for a value or a key that is there twice, for more than two, and for a
    key that some optimizer does not take.
    """
    sweeps = {}
    for pair in pairs:
        key, equals, texts = pair.partition("=")
        values = _literal(f"({texts},)")
        if isinstance(values, str):  # no Python literal: words
            values = tuple(map(_literal, texts.split(",")))
        if not equals or len(values) < 2 or "" in values:
            raise ValueError(f"{pair!r} is not of the form key=value,value with several values, as in lr=1e-3,2e-3")
        # as text, which names tables' columns and runs' folders
        twice = next((value for i, value in enumerate(values) if str(value) in map(str, values[:i])), None)
        if twice is not None or key in sweeps:
            raise ValueError(f"{pair!r} has {key if twice is None else twice} a second time; allowed: each once")
        for optimizer in optimizers:
            require_taker(key, [optimizer])
        if key in NAMED_OPTIONS.keys() - {"lr", "weight_decay"}:
            raise ValueError(f"{key!r} is the same for all; allowed: lr, weight_decay, or a constructor's argument")
        sweeps[key] = values
    if len(sweeps) > 2:
        raise ValueError(f"{', '.join(sweeps)} are {len(sweeps)} dimensions; allowed: one or two")
    return sweeps


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
