"""What `lowmem train` starts each optimizer with, and where that comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

TASK = "validation loss on the default task"


@dataclass(frozen=True)
class Default:
    """A peak learning rate, in the optimizer's own unit; options that it needs or was found with; its source."""

    lr: float
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


#: By class name, or by the name in tables where a class of this package and one of torch differ
DEFAULTS = {
    "AdamW": Default(
        2e-3,
        f"{TASK}: 5e-4 1.804, 8e-4 1.741, 1.5e-3 1.737, 2e-3 1.734; "
        "after 500 steps 1.5e-3 1.808, 3e-3 1.851, 1e-2 2.462",
    ),
    "Lomo": Default(
        0.5,
        f"{TASK}: 0.2 2.316, 0.3 2.298, 0.5 2.289; after 500 steps 0.5 2.319, 1 2.525, 2 2.567, 4 2.756",
    ),
    "SGD": Default(0.5, "Lomo's, whose update is the same"),
    "AdaLomo": Default(0.05, f"{TASK}: 0.02 1.728, 0.05 1.667, 0.1 1.804"),
    "Adafactor": Default(
        2e-3,
        f"{TASK}: 1e-3 1.788, 2e-3 1.784, 4e-3 1.833; with scale_parameter the rule is AdaLomo's: 0.05 1.666",
        {"relative_step": False, "scale_parameter": False},
    ),
    "TorchAdafactor": Default(0.05, f"{TASK}: 0.02 1.727, 0.05 1.667, 0.1 1.813"),
    "torch.Adafactor": Default(0.05, "TorchAdafactor's, which is the same rule"),
    "CAME": Default(
        2e-4, f"{TASK}: 5e-5 1.963, 1e-4 1.896, 2e-4 1.876, 5e-4 2.215, 1e-3 2.347, 2e-3 2.459, 4e-3 2.663"
    ),
    "SinkGD": Default(
        0.04,
        f"{TASK}: 0.02 1.799, 0.04 1.782, 0.08 1.965; with iterations=1 0.04 1.773, 0.08 1.833",
    ),
    "SWAN": Default(0.08, f"{TASK}: 0.02 1.742, 0.04 1.568, 0.08 1.508, 0.16 1.550, 0.32 1.800"),
    "AdaPM": Default(
        4e-3,
        f"{TASK}, rank 4, betas (0.9, 0.95), decay 0.1: 2e-3 1.670, 4e-3 1.657; rank 16 at 4e-3 1.678, "
        "with v of rows 1.781",
    ),
    "AdamMini": Default(
        2e-3, f"{TASK}: 1e-3 1.770, 2e-3 1.751, 4e-3 2.121; with betas (0.9, 0.95), decay 0.1, head_dim=32 2e-3 1.880"
    ),
    "MNGD": Default(0.04, f'SinkGD\'s, which it is as it comes; with norms=("row",), iterations=1 {TASK}: 0.04 1.802'),
    "APOLLO": Default(
        0.01,
        f"{TASK}: 4e-3 1.713; with fallback_lr=2e-3 0.01 1.706, 0.02 1.767. Rank 32, as in the paper a quarter of the "
        "model's width; 256 would be all of it",
        {"rank": 32, "fallback_lr": 2e-3},
    ),
    "APOLLOMini": Default(3e-3, f"{TASK}: 2e-3 2.079, 3e-3 2.035, 5e-3 2.079, 0.01 2.099, 0.02 2.286"),
}
CONSTRUCTOR = "the constructor's default; not tried on the default task"


def defaults_table(rows: list[tuple[str, Default]]) -> Table:
    """The defaults of optimizers, by name."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("optimizer", "peak lr", "options", "source"):
        table.add_column(column, justify="right" if column == "peak lr" else "left")
    for name, default in rows:
        options = ", ".join(f"{key}={value!r}" for key, value in default.options.items())
        table.add_row(name, f"{default.lr:g}", options, default.source)
    return table
