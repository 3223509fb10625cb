"""An optimizer class that is examined: found by name, and run over a few tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..naming import arguments_of, line_of, load_named
from .inputs import MATRICES, VECTOR, gradients, starts

LR = 1e-2

#: By class name, what is set unless options say otherwise, for those that take it: an lr that counts, ranks below the
#: sizes of the tensors, low-rank momenta, and a whitening that, unlike beta = 0.8, does not enlarge rounding errors.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "Adafactor": {"relative_step": False},
    "AdaFactor": {"relative_step": False},
    "APOLLO": {"rank": 4},
    "AdaPM": {"rank": 4, "policy": "lowrank"},
    "SWAN": {"beta": 0.5},
}

ALLOWED = "module:Class, a torch.optim.Optimizer such as torch.optim:AdamW, transformers:Adafactor or lowmem_optim:CAME"


@dataclass(frozen=True)
class Subject:
    """An optimizer class, with options for all that is asked of it.

    name: as reports call it.
    cls: the class.
    options: constructor arguments.
    group: options of the group of its parameters, for classes that look for some there and nowhere else.
    device: where its parameters are.
    """

    name: str
    cls: type
    options: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def takes(self, option: str) -> bool:
        """Whether the constructor has an argument of this name."""
        return option in arguments_of(self.cls)

    @property
    def version(self) -> str | None:
        """Of the package that the class comes from, where its module has one."""
        package = importlib.import_module(self.cls.__module__.partition(".")[0])
        return getattr(package, "__version__", None)

    @cached_property
    def takes_vectors(self) -> bool:
        """Whether it takes a step over a vector."""
        try:
            self.run(starts(VECTOR), gradients(VECTOR, steps=1))
        except Exception:  # anything that somebody else's code raises
            return False
        return True

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What probes run over that ask nothing of shapes: matrices and, if it takes them, a vector."""
        return (*MATRICES, VECTOR) if self.takes_vectors else MATRICES

    @property
    def arguments(self) -> dict[str, Any]:
        """What the constructor gets, weight decay left out."""
        preset = {k: v for k, v in PRESETS.get(self.cls.__name__, {}).items() if self.takes(k)}
        return {"lr": LR, **({"weight_decay": 0.0} if self.takes("weight_decay") else {}), **preset, **self.options}

    def make(self, params: Sequence[nn.Parameter], **overrides: Any) -> Any:
        """The optimizer over these parameters; raises ValueError with its arguments where it refuses them.

        Torch's random numbers start anew, so that optimizers that draw from them can be compared.
        """
        torch.manual_seed(0)
        arguments = {**self.arguments, **overrides}
        adapter = ADAPTERS.get(f"{self.cls.__module__.partition('.')[0]}.{self.cls.__name__}")
        groups = [{"params": list(params), **self.group}] if self.group else list(params)
        try:
            return adapter(self.cls, params, arguments) if adapter else self.cls(groups, **arguments)
        except Exception as error:  # anything that somebody else's code raises
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise ValueError(f"{self.name}({given}): {line_of(error)}") from error

    def params(self, starts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """Parameters with these values and strides, on the device."""
        return [nn.Parameter(_like(start, start.to(self.device, dtype))) for start in starts]

    def run(
        self,
        starts: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> tuple[list[nn.Parameter], Any]:
        """Parameters and optimizer after steps with these gradients."""
        params = self.params(starts, dtype)
        optimizer = self.make(params, **overrides)
        self.steps(optimizer, params, grads)
        return params, optimizer

    def steps(self, optimizer: Any, params: Sequence[nn.Parameter], grads: Sequence[Sequence[Tensor]]) -> None:
        """Takes a step for each list of gradients."""
        for of_step in grads:
            for param, grad in zip(params, of_step, strict=True):
                param.grad = grad.to(param, copy=True)
            optimizer.step()


def _like(start: Tensor, values: Tensor) -> Tensor:
    """A copy of ``values`` with the strides of ``start``, as far from an aligned address."""
    last = sum((n - 1) * stride for n, stride in zip(start.shape, start.stride(), strict=True))
    offset = start.storage_offset()
    memory = values.new_zeros(offset + last + 1 if start.numel() else offset)
    return memory.as_strided(start.shape, start.stride(), offset).copy_(values)


class LomoOptim:
    """lomo_optim's optimizers, which update in hooks of the backward pass, with a step.

    State is shown for each parameter, and saved as the package saves it: not at all.
    """

    def __init__(self, cls: type, params: Sequence[nn.Parameter], arguments: Mapping[str, Any]) -> None:
        on_cpu = all(param.device.type == "cpu" for param in params)
        # it puts its state on a GPU, whatever the parameters are on
        patched = mock.patch.object(Tensor, "cuda", lambda tensor: tensor) if on_cpu else nullcontext()
        own = {"loss_scale": None, **arguments} if "loss_scale" in arguments_of(cls) else arguments
        with patched:
            self.optimizer = cls(nn.ParameterList(params), **own)
        self.param_groups = self.optimizer.param_groups
        self.names = dict(self.optimizer.model.named_parameters())

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Its moments, under the names that it gives them."""
        keys = [key for key in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col") if hasattr(self.optimizer, key)]
        moments = {key: getattr(self.optimizer, key) for key in keys}
        return {p: {key: each[name] for key, each in moments.items() if name in each} for name, p in self.names.items()}

    def step(self) -> None:
        """What its `fused_backward` does after the backward pass."""
        group = self.param_groups[0]
        self.optimizer.lr = group["lr"]
        decay = group.setdefault("weight_decay", self.optimizer.weight_decay)
        self.optimizer.weight_decay, self.optimizer.do_weight_decay = decay, decay > 0
        if hasattr(self.optimizer, "step_num"):
            self.optimizer.step_num += 1
        self.optimizer.grad_func(None)

    def state_dict(self) -> dict[str, Any]:
        """The package's own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The package's own."""
        self.optimizer.load_state_dict(state)


#: By package and class name, what makes an optimizer of classes that are none by themselves.
ADAPTERS: Mapping[str, Callable[[type, Sequence[nn.Parameter], Mapping[str, Any]], Any]] = {
    "lomo_optim.AdaLomo": LomoOptim,
    "lomo_optim.Lomo": LomoOptim,
}


def load_subject(name: str, device: str = "cpu") -> Subject:
    """The subject that module:Class names; raises ValueError for what cannot be imported or is no optimizer class."""
    cls = load_named("optimizer", name, ALLOWED)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ValueError(f"optimizer is {name!r}, which is a {type(cls).__name__}; allowed: {ALLOWED}")
    return Subject(name.replace(":", "."), cls, device=device)
