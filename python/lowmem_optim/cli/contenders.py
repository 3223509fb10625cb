"""Who is timed by `lowmem bench`: this package's optimizers, what one would use instead, and the bytes of each."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem_kernels.testing import bytes_moved, cached_bytes, moment_bytes
from lowmem_kernels.testing.models import Shapes
from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.cli import registry
from lowmem_optim.cli.eager import EagerAdaPM, EagerApollo, EagerOptimizer, sinkhorn, whitened
from lowmem_optim.cli.timing import Step

COPY = "copy"
# a compiled step takes some five seconds for each tensor until it is compiled
MOST_TENSORS_TO_COMPILE = 32


@dataclass(frozen=True)
class Moved:
    """The bytes of a step: the rules of `bytes_moved` for matrices and vectors, and the itemsize of the states.

    `state` None means that of the parameters. Without `stacks`, more than two dimensions count as a vector. `rank` is
    that of projected moments, 0 where there are none.
    """

    matrices: str
    vectors: str
    state: int | None = 0
    stacks: bool = True
    rank: int = 0

    def least(self, shapes: Shapes, itemsize: int) -> int:
        """Bytes that have to pass the memory in a step, with caches that serve all that is read twice at once."""
        state = itemsize if self.state is None else self.state
        total = 0
        for shape in shapes.values():
            is_matrix = len(shape) == 2 or (len(shape) > 2 and self.stacks)
            rule = self.matrices if is_matrix else self.vectors
            requested = sum(bytes_moved(rule, prod(shape), itemsize, state))
            total += requested - cached_bytes(rule, prod(shape), itemsize)
            if self.rank and is_matrix:
                total += sum(moment_bytes(max(shape[-2:]), min(shape[-2:]), self.rank, itemsize))
        return total


@dataclass(frozen=True)
class Contender:
    """An optimizer as it is timed.

    name: in tables.
    make: the optimizer of parameters that have gradients.
    rivals: names of this package's optimizers that it is what one would use instead of; empty for those themselves.
    package: what has to be installed.
    compiled: whether the step, or of an EagerOptimizer what it does to a matrix, goes through torch.compile.
    moved: its bytes; None where nobody counted them.
    """

    name: str
    make: Callable[[list[nn.Parameter]], Optimizer]
    rivals: tuple[str, ...] = ()
    package: str = "torch"
    compiled: bool = False
    moved: Moved | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's."""
        return not self.rivals

    def why_not(self, shapes: Shapes, device: torch.device) -> str | None:
        """Why it cannot be timed here; None where it can."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if not self.compiled:
            return None
        if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
            return "torch.compile needs a C++ compiler, and there is none"
        if len(shapes) > MOST_TENSORS_TO_COMPILE:
            return (
                f"torch.compile takes too long for {len(shapes)} tensors; up to {MOST_TENSORS_TO_COMPILE} are compiled"
            )
        return None

    def step(self, optimizer: Optimizer) -> Step:
        """The optimizer's step, compiled where that is what is timed."""
        if not self.compiled or isinstance(optimizer, EagerOptimizer):
            return optimizer.step
        # without it, every .item() in torch's Adafactor ends the graph and nothing is fused
        return torch._dynamo.config.patch(capture_scalar_outputs=True)(torch.compile(optimizer.step))


# of this package's optimizers with default options; counted in Triton's interpreter by tests/interp
MOVED = {
    "AdamW": Moved("adamw", "adamw", state=4),
    "Lomo": Moved("scaled_update", "scaled_update"),
    "Adafactor": Moved("factored", "factored_vector"),
    "TorchAdafactor": Moved("factored", "factored_vector"),
    "AdaLomo": Moved("factored", "factored_vector"),
    "CAME": Moved("confidence", "confidence_vector", state=4),
    "SinkGD": Moved("sinkgd", "adamw", state=4, stacks=False),
    "MNGD": Moved("sinkgd", "adamw", state=4, stacks=False),
    "APOLLO": Moved("apollo", "adamw", state=4, stacks=False, rank=256),
    "APOLLOMini": Moved("apollo", "adamw", state=4, stacks=False, rank=1),
    "AdaPM": Moved("lowrank", "adamw", state=4),
    "AdamMini": Moved("adam_mini", "adam_mini", state=4),
}
# parameters have no names here, by which AdaPM would tell what each is: all matrices get what most have
UNNAMED: dict[str, dict[str, Any]] = {"AdaPM": {"policy": "lowrank"}}
# SinkGD, unless told otherwise
SAME_AS_ANOTHER = {"mngd"}
PROJECTED = ("APOLLO", "APOLLOMini")
FACTORED = ("Adafactor", "TorchAdafactor", "AdaLomo")


def ours(names: list[str], dtype: torch.dtype) -> list[Contender]:
    """This package's optimizers of these names, all if there are none but for SAME_AS_ANOTHER, with default options.

    For bfloat16, where these round stochastically, each a second time with rounding to nearest. Raises ValueError for
    a name that is not one of them.
    """
    own = {key: choice for key, choice in registry.choices().items() if issubclass(choice.cls, LowMemOptimizer)}
    unknown = [name for name in names if name.lower() not in own]
    if unknown:
        allowed = ", ".join(choice.name for choice in own.values())
        raise ValueError(f"{unknown[0]!r} is not an optimizer of this package; allowed: {allowed}")
    chosen = map(str.lower, names) if names else (key for key in own if key not in SAME_AS_ANOTHER)
    found = [own[key] for key in dict.fromkeys(chosen)]
    roundings: dict[str, dict[str, Any]] = {"": {}}
    if dtype == torch.bfloat16:
        roundings[", to nearest"] = {"stochastic_rounding": False}
    return [
        Contender(choice.name + label, _maker(choice, options), moved=MOVED.get(choice.name))
        for choice in found
        for label, options in roundings.items()
    ]


def others(contenders: list[Contender]) -> list[Contender]:
    """What one would use instead of any of these."""
    names = {contender.name.partition(",")[0] for contender in contenders}
    return [other for other in OTHERS if names.intersection(other.rivals)]


def _maker(choice: registry.Choice, options: dict[str, Any]) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: choice.cls(params, **{**UNNAMED.get(choice.name, {}), **options})


def _transformers(params: list[nn.Parameter]) -> Optimizer:
    import transformers

    return transformers.Adafactor(params)


def _came(params: list[nn.Parameter]) -> Optimizer:
    import came_pytorch

    return came_pytorch.CAME(params, lr=2e-4)


def _galore(params: list[nn.Parameter]) -> Optimizer:
    import galore_torch

    projected: dict[str, Any] = {"rank": 256, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim == 2], **projected},
        {"params": [p for p in params if p.ndim != 2]},
    ]
    return galore_torch.GaLoreAdamW(
        [group for group in groups if group["params"]], lr=1e-2, no_deprecation_warning=True
    )


def _eager(normalize: Callable[[Tensor], Tensor]) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: EagerOptimizer(params, normalize)


def _compiled_sinkhorn(params: list[nn.Parameter]) -> Optimizer:
    return EagerOptimizer(params, torch.compile(sinkhorn))


OTHERS = [
    Contender(
        "torch.AdamW(fused)",
        lambda params: torch.optim.AdamW(params, fused=True),
        ("AdamW", "AdaPM", "AdamMini", *PROJECTED),
        moved=Moved("adamw", "adamw", state=None),
    ),
    Contender(
        "torch.SGD(fused)",
        lambda params: torch.optim.SGD(params, lr=1e-3, fused=True),
        ("Lomo",),
        moved=Moved("scaled_update", "scaled_update"),
    ),
    Contender("torch.Adafactor", lambda params: torch.optim.Adafactor(params, foreach=False), FACTORED),
    Contender("torch.Adafactor(foreach)", lambda params: torch.optim.Adafactor(params, foreach=True), FACTORED),
    Contender(
        "torch.Adafactor(compiled)",
        lambda params: torch.optim.Adafactor(params, foreach=True),
        FACTORED,
        compiled=True,
    ),
    Contender("transformers.Adafactor", _transformers, FACTORED, package="transformers"),
    Contender("came_pytorch.CAME", _came, ("CAME",), package="came_pytorch"),
    Contender("SinkGD in torch", _eager(sinkhorn), ("SinkGD", "MNGD")),
    Contender("SinkGD in torch(compiled)", _compiled_sinkhorn, ("SinkGD", "MNGD"), compiled=True),
    Contender("SWAN in torch", _eager(whitened), ("SWAN",)),
    Contender("APOLLO in torch", EagerApollo, ("APOLLO",)),
    Contender("APOLLO-Mini in torch", lambda params: EagerApollo(params, 1, "tensor", 128.0), ("APOLLOMini",)),
    Contender("galore_torch.GaLoreAdamW", _galore, ("APOLLO",), package="galore_torch"),
    Contender("AdaPM in torch", EagerAdaPM, ("AdaPM",)),
]


def make_tensors(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients of a language model's size; the same every time on the same kind of device."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (0.02, 1e-3)
    values, grads = (
        [(torch.randn(shape, generator=generator, device=device, dtype=dtype) * size) for shape in shapes.values()]
        for size in sizes
    )
    return values, grads


def parameters(values: list[Tensor], grads: list[Tensor]) -> list[nn.Parameter]:
    """Parameters of their own with these values, and the gradients themselves, which no step changes."""
    params = [nn.Parameter(value.clone()) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def copier(values: list[Tensor]) -> Step:
    """A copy of as many bytes as all values have, in one piece."""
    source = torch.cat([value.flatten() for value in values])
    target = source.clone()
    return lambda: target.copy_(source)
