"""Triton kernels of the factored family. README.md of the family has the picture and the bytes.

A kernel works through tickets: pieces of phases of parameters. Each launch takes the tickets of one phase.
"""

from .adafactor import _factored_kernel
from .came import _confidence_kernel

__all__ = ["_confidence_kernel", "_factored_kernel"]
