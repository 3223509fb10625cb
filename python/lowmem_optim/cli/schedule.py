"""How the learning rate goes from the first step to the last."""

import math
from collections.abc import Callable

#: What is left of the way down, 1 to 0, at a fraction of the steps after the warmup
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
    # warmup, stable, decay: down in the last fifth
    "wsd": lambda progress: min(1.0, (1 - progress) / 0.2),
}


def schedule(step: int, shape: str, warmup: int, steps: int, final: float) -> float:
    """Fraction of the peak learning rate at a step from 0: up over `warmup` steps, then by the shape to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return final + (1 - final) * SHAPES[shape](progress)
