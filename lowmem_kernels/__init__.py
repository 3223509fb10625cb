"""Fused kernels for optimizers that keep almost no state. See README.md for the families."""

__version__ = "0.1.0"

__all__ = ["__version__"]
