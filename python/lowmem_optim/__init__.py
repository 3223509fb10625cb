"""Optimizers that train large PyTorch models with almost no optimizer memory.

They are ordinary torch.optim optimizers, with groups, schedulers, closures, GradScaler and checkpoints.
"""

from .adamw import AdamW
from .lomo import Lomo

__all__ = ["AdamW", "Lomo"]
