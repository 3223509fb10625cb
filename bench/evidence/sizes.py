"""What sections share: a GPU and real models to work on, or a CPU and a tiny one that shows that they work."""

from __future__ import annotations

import torch

from lowmem_kernels.testing.models import MODELS, Architecture, Shapes, model_shapes

#: By whether it is a dry run.
DEVICES = {False: torch.device("cuda"), True: torch.device("cpu")}
#: Models over whose parameters optimizers are timed.
BENCHED = ("gpt2", "llama-1b", "llama-7b")
#: A model of a few thousand parameters, which is not among those of `lowmem bench`.
TINY = "tiny"


def shapes_of(model: str, layers: int | None = None) -> Shapes:
    """Return the shapes of a model's parameters, TINY among them."""
    if model == TINY:
        return Architecture(64, 32, 48, 2, 4, 2).shapes(layers)
    return model_shapes(model, layers)


def layers_of(model: str) -> int:
    """Return how many layers a model has."""
    return 2 if model == TINY else MODELS[model].layers
