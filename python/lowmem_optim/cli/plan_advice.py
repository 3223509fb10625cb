"""What to take, by a plan and the memory of a device, and how to write it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem_optim.cli.plan_memory import Row, Setting, activation_bytes
from lowmem_optim.cli.plan_model import Model

GB = 10**9

#: What is recommended if it fits: the first, and an ordinary step before a fused one. In the order of how much of Adam
#: a rule keeps, since most recipes are made for Adam; the last entry says what is kept.
PREFERRED = {
    "AdamW": "both moments of every element",
    "AdamMini": "the momentum of every element, and a second moment for each row",
    "APOLLO": "both moments of a random projection",
    "APOLLOMini": "both moments of one random direction",
    "Adafactor": "a second moment in rows and columns",
    "SinkGD": None,
    "Lomo": None,
    # without stochastic rounding, so it comes last
    "torch.AdamW(fused)": "both moments of every element, in the parameters' dtype",
}
LAST = len(PREFERRED)


def recommendation(model: Model, rows: list[Row], setting: Setting, gpu: int | None) -> str:
    """Returns a sentence or two: what to take and why, or what would make something fit."""
    least = min(rows, key=lambda row: row.total)
    if gpu is None:
        most = max(rows, key=lambda row: row.total)
        return (
            f"{_name(least)} takes least, {_gb(least.total)}, and {_name(most)} most, {_gb(most.total)}; "
            "--gpu SIZE says what to take."
        )
    best = best_of(rows, gpu)
    if best is None:
        nothing = f"Nothing fits in {_gb(gpu)}: the least is {_name(least)}, {_gb(least.total)}."
        return f"{nothing} {_advice(model, least, setting, gpu)}"
    larger = [row for row in rows if row.total > gpu and _place(row) <= _place(best) and row.optimizer in PREFERRED]
    beyond = min(larger, key=lambda row: (_place(row), row.total), default=None)
    ordinary = " with ordinary steps" if beyond and beyond.optimizer == best.optimizer else ""
    against = f"; {_name(beyond)}{ordinary} would take {_gb(beyond.total)}" if beyond else ""
    take = f"Take {_name(best)}: {_gb(best.total)} of {_gb(gpu)}{_reason(best, rows)}{against}."
    return take + _room(best, setting, gpu)


def best_of(rows: list[Row], gpu: int) -> Row | None:
    """The row to take; None where nothing fits."""
    fitting = [row for row in rows if row.total <= gpu]
    return min(fitting, key=lambda row: (_place(row), row.mode == "fused", row.total), default=None)


def in_code(best: Row, options: Mapping[str, Any]) -> str:
    """The lines that make this package's optimizer with the options of the plan."""
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    code = f"optimizer = lowmem_optim.{best.optimizer}(lowmem_optim.split_params(model){arguments})"
    return code + ("\nlowmem_optim.fuse_backward(model, optimizer)" if best.mode == "fused" else "")


def _place(row: Row) -> int:
    # those that are not in the order come last, from the least
    return [*PREFERRED].index(row.optimizer) if row.optimizer in PREFERRED else LAST


def _reason(best: Row, rows: list[Row]) -> str:
    kept = PREFERRED.get(best.optimizer)
    if len({row.optimizer for row in rows}) == 1:
        return ""
    if kept is None:
        return ", and none of these that keeps more of Adam fits"
    return f", and of those that fit it keeps most of Adam ({kept})"


def _room(best: Row, setting: Setting, gpu: int) -> str:
    """How large the batch may be."""
    if not best.activations:
        return ""
    most = (gpu - best.total + best.activations) * setting.batch // best.activations
    return f" It fits up to --batch {most}." if most > setting.batch else ""


def _advice(model: Model, least: Row, setting: Setting, gpu: int) -> str:
    """What would make the least fit, by its own numbers, from what costs least to what costs most."""
    if model.sizes is not None and least.activations is not None:
        rest = least.total - least.activations
        if not setting.checkpointing:
            total = rest + activation_bytes(model.sizes, replace(setting, checkpointing=True))
            if total <= gpu:
                return f"With --checkpointing it takes {_gb(total)}."
        one = replace(setting, batch=1, checkpointing=True)
        if rest + activation_bytes(model.sizes, one) <= gpu:
            return "With --checkpointing and a smaller --batch it fits."
        room = (gpu - rest) * one.sequence // activation_bytes(model.sizes, one)
        if room > 0:
            return f"With --checkpointing, --batch 1 and --sequence {room} it fits."
    if least.mode == "ordinary" and least.total - least.gradients <= gpu:
        return "An optimizer of this package with fuse_backward frees gradients as they arrive."
    if setting.sharding == "fsdp2":
        return "It takes more --ranks, larger devices, or a smaller model."
    return "It takes a larger device, several with --ranks N --sharding fsdp2, or a smaller model."


def _name(row: Row) -> str:
    return row.optimizer + (" with fuse_backward" if row.mode == "fused" else "")


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:,.1f} GB" if nbytes >= GB else f"{nbytes / 10**6:,.1f} MB"
