"""Fused kernels for optimizers that keep almost no state: few launches for many tensors, few trips through memory.

Families of verbs live in subpackages (`lowmem_kernels.elementwise`, `lowmem_kernels.factored`); each verb has a torch
reference, which is its specification and the path for CPUs, and Triton kernels. What all of them share is here.
"""

from .dispatch import choose, why_not_triton
from .options import GradTransform, Rounding

#: Version of both packages, as in pyproject.toml.
__version__ = "0.1.0"

__all__ = ["GradTransform", "Rounding", "__version__", "choose", "why_not_triton"]
