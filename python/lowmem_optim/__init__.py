"""Optimizers that train large PyTorch models with almost no optimizer memory.

They are ordinary torch.optim optimizers, with groups, schedulers, closures, GradScaler and checkpoints.
"""

from .adafactor import Adafactor
from .adalomo import AdaLomo
from .adammini import AdamMini
from .adamw import AdamW
from .adapm import AdaPM
from .came import CAME
from .lomo import Lomo
from .mngd import MNGD
from .roles import split_params
from .sinkgd import SinkGD
from .swan import SWAN
from .torch_adafactor import TorchAdafactor

__all__ = [
    "CAME",
    "MNGD",
    "SWAN",
    "AdaLomo",
    "AdaPM",
    "Adafactor",
    "AdamMini",
    "AdamW",
    "Lomo",
    "SinkGD",
    "TorchAdafactor",
    "split_params",
]
