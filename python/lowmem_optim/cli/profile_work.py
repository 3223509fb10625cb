"""What `lowmem profile` runs: steps of an optimizer or calls of a verb, their names and their bytes."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_kernels.ranges import named_ranges
from lowmem_kernels.testing.models import Shapes, model_shapes, parameter_count
from lowmem_kernels.testing.verbs import make_call
from lowmem_optim.cli import contenders, registry


@dataclass(frozen=True)
class Work:
    """What is profiled.

    title: what it is.
    run: one step, or one call.
    elements: of all parameters.
    least: bytes that a step has to move by formula; None where nobody counted them.
    """

    title: str
    run: Callable[[], object]
    elements: int
    least: int | None


def shapes_of(texts: list[str], model: str, layers: int | None) -> Shapes:
    """Shapes from texts such as "4096x11008", or of a model if there are none; raises ValueError."""
    for text in texts:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
            raise ValueError(f"{text!r} is not of the form 4096x11008")
    named = {f"{i}": tuple(map(int, text.split("x"))) for i, text in enumerate(texts)}
    return named or model_shapes(model, layers)


def of_optimizer(name: str, shapes: Shapes, dtype: torch.dtype, device: str) -> Work:
    """Steps of an optimizer of this package or of torch, with its learning rate for the default task."""
    choice = registry.find(name)
    params = contenders.parameters(*contenders.make_tensors(shapes, dtype, torch.device(device)))
    module = nn.Module()
    for i, param in enumerate(params):
        module.register_parameter(f"p{i}", param)
    optimizer = choice.build(module, choice.default.lr, contenders.UNNAMED.get(choice.name, {}))
    moved = contenders.MOVED.get(choice.name)
    least = None if moved is None else moved.least(shapes, dtype.itemsize)
    return Work(_title(choice.name, shapes, dtype), optimizer.step, parameter_count(shapes), least)


def of_verb(name: str, shapes: Shapes, dtype: torch.dtype, device: str) -> Work:
    """Calls of a verb; raises ValueError for a name that is not in `lowmem_kernels.testing.verbs.VERBS`."""
    call = make_call(name, list(shapes.values()), dtype, device)
    return Work(_title(name, shapes, dtype), call.run, parameter_count(shapes), call.least)


def run(work: Work, steps: int, enter: Callable[[str], AbstractContextManager[Any]]) -> list[str]:
    """Take the steps, every verb in a range of its name; return the names in their order."""
    names: dict[str, None] = {}

    def enter_and_note(name: str) -> AbstractContextManager[Any]:
        names[name] = None
        return enter(name)

    with named_ranges(enter_and_note):
        for _ in range(steps):
            work.run()
    return list(names)


def write_formula(path: Path, work: Work, names: list[str], steps: int) -> None:
    """Write what bench/nsight compares counters with: the ranges' names, steps, elements, and least bytes of a step."""
    figures = {"ranges": names, "steps": steps, "elements": work.elements, "least_bytes": work.least}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _title(name: str, shapes: Shapes, dtype: torch.dtype) -> str:
    millions = parameter_count(shapes) / 1e6
    tensors = f"{len(shapes)} tensor{'s' * (len(shapes) > 1)}"
    return f"{name} over {millions:,.1f} M parameters in {tensors}, {str(dtype).removeprefix('torch.')}"
