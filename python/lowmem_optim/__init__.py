"""Optimizers that train large PyTorch models with almost no optimizer memory.

They are ordinary torch.optim optimizers, with groups, schedulers, closures, GradScaler and checkpoints.
"""

from .adafactor import Adafactor
from .adalomo import AdaLomo
from .adamw import AdamW
from .came import CAME
from .lomo import Lomo
from .roles import split_params
from .torch_adafactor import TorchAdafactor

__all__ = ["CAME", "AdaLomo", "Adafactor", "AdamW", "Lomo", "TorchAdafactor", "split_params"]
