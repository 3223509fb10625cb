"""Optimizers that train large PyTorch models with almost no optimizer memory."""

__all__: list[str] = []
