"""What is known of one optimizer's training."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class Run:
    """One optimizer's training so far: losses in nats per byte, times in milliseconds, memory in bytes.

    `status` is "running", then "finished", "diverged" (a loss was not finite) or "interrupted". `settings` are the
    values of a sweep that are this run's, as text. `lr` is the peak learning rate, from `lr_source`.

    Some lists hold (steps taken, value) pairs: `validation_loss`; `grad_norm`, of all gradients before clipping, where
    they are there at once or a bound needs it; `update_rms`, the root mean square of what a step adds to parameters.
    Norms that are not finite are left out.
    `gradient_bytes` are those of the gradients alive at a time, at most.
    """

    EVERY_SOME_STEPS: ClassVar[tuple[str, ...]] = ("validation_loss", "grad_norm", "update_rms")

    optimizer: str
    lr: float
    lr_source: str
    parameters: int
    tokens_per_step: int
    settings: dict[str, str] = field(default_factory=dict)
    fused: bool = False
    status: str = "running"
    training_loss: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    grad_norm: list[tuple[int, float]] = field(default_factory=list)
    update_rms: list[tuple[int, float]] = field(default_factory=list)
    state_bytes: int = 0
    gradient_bytes: int = 0
    peak_bytes: int | None = None
    wall_seconds: float = 0.0

    @property
    def label(self) -> str:
        """The optimizer with the values of the sweep, which tells runs apart."""
        return " ".join([self.optimizer, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def steps_taken(self) -> int:
        """Steps whose loss is known."""
        return len(self.training_loss)

    @property
    def final_loss(self) -> float | None:
        """The last validation loss; None for a run that diverged, or was interrupted before its first validation."""
        return self.validation_loss[-1][1] if self.validation_loss and self.status != "diverged" else None
