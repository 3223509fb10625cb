"""Optimizers that train large PyTorch models with almost no optimizer memory.

They are ordinary torch.optim optimizers, with groups, schedulers, closures, GradScaler and checkpoints.
"""

from .adafactor import Adafactor
from .adalomo import AdaLomo
from .adammini import AdamMini
from .adamw import AdamW
from .adapm import AdaPM
from .apollo import APOLLO, APOLLOMini
from .came import CAME
from .fused_backward import fuse_backward
from .lomo import Lomo
from .mngd import MNGD
from .roles import split_params
from .sinkgd import SinkGD
from .swan import SWAN
from .torch_adafactor import TorchAdafactor
from .training_args import apollo_from_training_args

__all__ = [
    "APOLLO",
    "CAME",
    "MNGD",
    "SWAN",
    "APOLLOMini",
    "AdaLomo",
    "AdaPM",
    "Adafactor",
    "AdamMini",
    "AdamW",
    "Lomo",
    "SinkGD",
    "TorchAdafactor",
    "apollo_from_training_args",
    "fuse_backward",
    "split_params",
]
