"""The pictures of docs/choosing.md, from the package's own formulas and planner: python docs/pictures/choosing.py"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from picture import BLUE, FOLDER, GREEN, GREY, INK, LILAC, ORANGE, PALE, RED, new, save
from torch import Tensor, nn

from lowmem_kernels.testing import bytes_moved
from lowmem_optim.cli import registry
from lowmem_optim.cli.contenders import MOVED, Moved
from lowmem_optim.cli.measure import state_bytes
from lowmem_optim.cli.plan_memory import Row, Setting, nbytes, plan
from lowmem_optim.cli.plan_model import load_model

GB = 10**9
#: The matrix that "bytes per parameter" are of, and its dtype.
SHAPE, DTYPE = (4096, 4096), torch.bfloat16


# state against bytes moved, of one matrix


@dataclass(frozen=True)
class Point:
    """Bytes for each element of a matrix: kept between steps, moved by one at least, and requested by one."""

    label: str
    state: float
    least: float
    requested: float


#: Settings that change where an optimizer is: its arguments and what moves then.
VARIANTS: tuple[tuple[str, str, dict[str, Any], Moved], ...] = (
    ("AdamW", "bf16 state", {"state_dtype": "param"}, Moved("adamw", "adamw", state=None)),
    ("CAME", "bf16 state", {"state_dtype": "param"}, Moved("confidence", "confidence_vector", state=None)),
    ("SinkGD", "iterations=1", {"iterations": 1}, Moved("sinkgd_once", "adamw", state=4, stacks=False)),
    ("AdaPM", "adam-mini", {"second_moment": "adam-mini"}, Moved("lowrank_rows", "adamw")),
)


def points() -> list[Point]:
    """Every optimizer with default options, and the variants."""
    found = [_point(name, "", {}, moved) for name, moved in MOVED.items()]
    found += [_point(*variant) for variant in VARIANTS]
    # by the formula of its page, since its programs share tiles: g three times, p once, p written once
    swan = 5.0 * DTYPE.itemsize
    return [*found, Point("SWAN", _state("SWAN", {}), swan, swan)]


def _point(name: str, label: str, options: dict[str, Any], moved: Moved) -> Point:
    least = moved.least({"weight": SHAPE}, DTYPE.itemsize) / prod(SHAPE)
    state = DTYPE.itemsize if moved.state is None else moved.state
    requested = sum(bytes_moved(moved.matrices, 1, DTYPE.itemsize, state))
    return Point(f"{name} ({label})" if label else name, _state(name, options), least, max(least, requested))


def _state(name: str, options: dict[str, Any]) -> float:
    # the names say to AdaPM which block of a model it is
    weight = nn.Linear(*SHAPE, bias=False, device="meta", dtype=DTYPE)
    module = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": weight})})
    optimizer: Any = registry.find(name).construct(module, options)
    optimizer.init_state()
    return state_bytes(optimizer) / prod(SHAPE)


def places(found: Sequence[Point]) -> dict[tuple[float, float], list[Point]]:
    """Points that one could not tell apart, by where they are."""
    together: dict[tuple[float, float], list[Point]] = {}
    for point in found:
        together.setdefault((round(point.state, 1), round(point.least, 1)), []).append(point)
    return together


def draw_bytes(path: Path) -> None:
    """Writes the picture of state against bytes moved."""
    figure = new(9, 6)
    axes = figure.subplots()
    for (state, least), group in places(points()).items():
        axes.plot([state, state], [least, max(point.requested for point in group)], color=PALE, linewidth=5, zorder=1)
        axes.plot(state, least, "o", color=BLUE, markersize=7, zorder=2)
        text = "\n".join(_lines([point.label for point in group]))
        axes.text(state + 0.14, least, text, va="center", fontsize=9, color=INK)
    axes.set_xlim(-0.3, 9.6)
    axes.set_ylim(4, 24)
    axes.set_xlabel("state, bytes per parameter", color=GREY)
    axes.set_ylabel("moved by a step, bytes per parameter", color=GREY)
    axes.set_title(
        "A 4096 x 4096 matrix in bfloat16. Dots: at least, with caches that serve second looks (formulas).\n"
        "Bars end at what kernels request. Nothing is measured on a GPU.",
        loc="left", fontsize=9, color=GREY,
    )  # fmt: skip
    axes.grid(color=PALE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _lines(labels: Sequence[str], width: int = 3) -> list[str]:
    return [", ".join(labels[start : start + width]) for start in range(0, len(labels), width)]


# what a model takes


@dataclass(frozen=True)
class Entry:
    """An optimizer of the pictures of whole models, and its arguments."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name, and its arguments in short."""
        return ", ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


ENTRIES = (
    Entry("AdamW"),
    Entry("AdamW", {"state_dtype": "param"}),
    Entry("AdaPM"),
    Entry("CAME", {"state_dtype": "param"}),
    Entry("AdamMini"),
    Entry("AdaPM", {"second_moment": "adam-mini"}),
    Entry("APOLLO"),
    Entry("APOLLO", {"fallback": "adafactor"}),
    Entry("SinkGD"),
    Entry("SinkGD", {"fallback": "table"}),
    Entry("SinkGD", {"fallback": "adafactor"}),
    Entry("Adafactor"),
    Entry("Lomo"),
)
MODELS = ("llama-7b", "llama-3-8b")
SETTING = Setting(DTYPE, batch=1, sequence=2048, checkpointing=True)
COLOURS = {
    "parameters": BLUE,
    "activations": "#a9b7c9",
    "gradients alive in a fused backward pass": ORANGE,
    "state of matrices": GREEN,
    "state of embeddings, head and vectors": LILAC,
    "temporaries": RED,
    "more in an ordinary step": "none",
}


def stacks(model: str, entries: Sequence[Entry] = ENTRIES) -> dict[str, dict[str, int]]:
    """Bytes of each part that `lowmem plan MODEL --checkpointing` has, by optimizer, with its state by roles."""
    found = load_model(model, DTYPE)
    result = {}
    for entry in entries:
        choice = registry.find(entry.name)
        rows = {row.mode: row for row in plan(found, [choice], dict(entry.options), SETTING)}
        optimizer: Any = choice.construct(found.module, dict(entry.options))
        optimizer.init_state()
        result[entry.label] = _parts(rows["ordinary"], rows["fused"], _rest(found.module, optimizer))
    return result


def _parts(ordinary: Row, fused: Row, rest: int) -> dict[str, int]:
    parts = (
        fused.parameters,
        fused.activations or 0,
        fused.gradients,
        fused.state - rest,
        rest,
        fused.temporaries or 0,
        ordinary.total - fused.total,
    )
    return dict(zip(COLOURS, parts, strict=True))


def _rest(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state of all that is no matrix of a layer."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = {id(param) for name, param in module.named_parameters() if name == "lm_head.weight"}
    return sum(
        nbytes(value)
        for param, state in optimizer.state.items()
        if id(param) in embeddings | head or param.ndim < 2
        for value in state.values()
        if isinstance(value, Tensor)
    )


def draw_memory(path: Path, models: Sequence[str] = MODELS, entries: Sequence[Entry] = ENTRIES) -> None:
    """Writes the picture of what whole models take, one panel each."""
    figure = new(12, 0.36 * len(entries) + 1.7)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _panel(axes, model, stacks(model, entries))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        "lowmem plan --checkpointing: bfloat16, 1 x 2048 tokens, the update inside the backward pass. "
        "Planned, not measured.",
        x=0.01, ha="left", fontsize=9, color=GREY,
    )  # fmt: skip
    save(figure, path)


def _panel(axes: Any, model: str, bars: dict[str, dict[str, int]]) -> None:
    left = dict.fromkeys(bars, 0.0)
    for part, colour in COLOURS.items():
        widths = [parts[part] / GB for parts in bars.values()]
        edge = {"edgecolor": ORANGE, "linestyle": ":", "linewidth": 1} if colour == "none" else {}
        axes.barh([*bars], widths, left=[*left.values()], color=colour, label=part, height=0.7, **edge)
        if colour != "none":
            left = {label: start + width for (label, start), width in zip(left.items(), widths, strict=True)}
    for label, total in left.items():
        axes.text(total + 0.4, label, f"{total:.1f}", va="center", fontsize=8, color=INK)
    for size in (24, 80):
        axes.axvline(size, color=INK, linestyle="--", linewidth=0.8)
        axes.text(size + 0.4, -0.75, f"{size} GB", fontsize=8, color=INK, va="center")
    axes.set_ylim(len(bars) - 0.4, -1.1)
    axes.set_title(model, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("GB (1e9 bytes)", color=GREY)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


#: What this script writes.
PICTURES = {"bytes.svg": draw_bytes, "memory.svg": draw_memory}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, draw in PICTURES.items():
        draw(folder / name)
