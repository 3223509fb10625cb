"""Parameters, gradients and optimizers for processes that hold shards, and a model without a backward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import Replicate, distribute_tensor

from lowmem_kernels.numerics import parity_tolerance
from lowmem_optim import (
    APOLLO,
    CAME,
    MNGD,
    SWAN,
    Adafactor,
    AdaLomo,
    AdamMini,
    AdamW,
    AdaPM,
    APOLLOMini,
    Lomo,
    SinkGD,
    TorchAdafactor,
)
from optim.tensors import assert_same_bits, values

#: Of up to 4 processes, some have nothing of most of these along one dimension or the other.
SHAPES = [(8, 6), (16, 3, 5), (7, 5), (1, 6), (3, 4, 5), (5,), (0, 4), ()]


@dataclass(frozen=True)
class Config:
    """An optimizer with options.

    all_reduces: in a step, besides the two all-to-alls for each bucket of whole matrices, and the sums over rows.
    row_sums: all-reduces for each bucket of matrices whose rows alone are in several processes; 0: they are put
        together as those that are cut otherwise.
    same_bits: shards end with those of the whole, where there are no sums over rows.
    """

    name: str
    optimizer: type
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    all_reduces: int = 0
    row_sums: int = 0
    same_bits: bool = True

    def make(self, params):
        return self.optimizer(params, **{"lr": 1e-2, "weight_decay": 0.1, **self.options})


CONFIGS = [
    Config("AdamW, float32", AdamW, torch.float32),
    Config("AdamW, bfloat16", AdamW, torch.bfloat16),
    Config("AdamW, bfloat16 and states, skipping steps", AdamW, torch.bfloat16,
           {"state_dtype": "param", "skip_nonfinite": "step"}, all_reduces=1),
    Config("Lomo, bfloat16", Lomo, torch.bfloat16),
    Config("Lomo, float32, clip_grad_norm", Lomo, torch.float32,
           {"clip_grad_norm": 1.0}, all_reduces=1, same_bits=False),
    Config("Adafactor, float32", Adafactor, torch.float32, {"lr": None}, row_sums=1),
    Config("Adafactor, bfloat16, momentum", Adafactor, torch.bfloat16, {"relative_step": False, "beta1": 0.9},
           row_sums=1),
    Config("TorchAdafactor, float32", TorchAdafactor, torch.float32),
    Config("AdaLomo, float32, clip_grad_norm", AdaLomo, torch.float32,
           {"clip_grad_norm": 1.0}, all_reduces=1, row_sums=1, same_bits=False),
    Config("AdaLomo, bfloat16", AdaLomo, torch.bfloat16, row_sums=1),
    Config("CAME, float32", CAME, torch.float32, row_sums=2),
    Config("CAME, bfloat16", CAME, torch.bfloat16, row_sums=2),
    Config("SinkGD, float32", SinkGD, torch.float32, row_sums=5),
    Config("SinkGD, bfloat16, momentum, stacks", SinkGD, torch.bfloat16, {"momentum": 0.9, "stacks": "batched"},
           row_sums=5),
    Config("MNGD, float32, frobenius, once", MNGD, torch.float32,
           {"norms": ("row", "col", "frobenius"), "iterations": 1}, row_sums=2),
    Config("MNGD, float32, fallback table", MNGD, torch.float32,
           {"norms": ("row", "spectral"), "iterations": 1, "fallback": "table"}, row_sums=6),
    Config("MNGD, bfloat16, spectral", MNGD, torch.bfloat16, {"norms": ("row", "spectral"), "iterations": 1}),
    Config("SWAN, float32", SWAN, torch.float32, {"stacks": "batched"}),
    Config("SWAN, bfloat16, fallback adafactor", SWAN, torch.bfloat16, {"fallback": "adafactor"}, row_sums=1),
    Config("APOLLO, float32", APOLLO, torch.float32, {"rank": 2, "update_proj_gap": 7}, row_sums=1),
    Config("APOLLO, bfloat16 and states, stacks", APOLLO, torch.bfloat16,
           {"rank": 2, "state_dtype": "param", "stacks": "batched"}, row_sums=1),
    Config("APOLLOMini, float32", APOLLOMini, torch.float32, row_sums=1),
    Config("AdaPM, float32", AdaPM, torch.float32, {"rank": 2}),
    Config("AdaPM, bfloat16, adam-mini", AdaPM, torch.bfloat16, {"rank": 2, "second_moment": "adam-mini"}),
    Config("AdamMini, bfloat16", AdamMini, torch.bfloat16),
]  # fmt: skip


#: of which a checkpoint is carried on from
CHECKPOINTED = [config for config in CONFIGS if config.dtype is torch.bfloat16]


def starts(dtype):
    return [values(*shape, seed=i).to(dtype) for i, shape in enumerate(SHAPES)]


def gradients(step, dtype):
    return [values(*shape, seed=100 * step + i + 50).to(dtype) for i, shape in enumerate(SHAPES)]


def distributed(tensor, mesh, placements):
    """A tensor that all processes have, as a DTensor; what cannot be cut like this is cut otherwise, or copied."""
    allowed = []
    for size, placement in zip(mesh.shape, placements, strict=True):
        dim = getattr(placement, "dim", 0)
        deal = getattr(placement, "split_factor", 1)
        uneven = deal > 1 and len(set(placements)) == 1 and tensor.ndim and tensor.shape[dim] % (deal * size)
        allowed.append(Replicate() if dim >= tensor.ndim or uneven else placement)
    return distribute_tensor(tensor, mesh, allowed, src_data_rank=None)


class Model(nn.Module):
    """Parameters that get gradients without a backward pass, on a mesh or, with None, whole."""

    def __init__(self, mesh, placements, fill=None):
        super().__init__()
        params = starts(torch.bfloat16)
        if fill is not None:
            params = [torch.full_like(p, fill) for p in params]
        # a checkpoint has nothing of what has no elements
        params = [p for p in params if p.numel()]
        self.place = (lambda t: t) if mesh is None else (lambda t: distributed(t, mesh, placements))
        self.weights = nn.ParameterList([nn.Parameter(self.place(p)) for p in params])

    def step(self, optimizer, step):
        grads = [g for g in gradients(step, torch.bfloat16) if g.numel()]
        for param, grad in zip(self.parameters(), grads, strict=True):
            param.grad = self.place(grad)
        optimizer.step()
        optimizer.zero_grad()

    def load(self, optimizer, states):
        self.load_state_dict(states["model"])
        set_optimizer_state_dict(self, optimizer, states["optimizer"])


def assert_same_numbers(found, expected, started, steps):
    """What sums in another order may make of it: float32 within the project's tolerance, and of bfloat16, whose
    rounding has the same noise, a few elements the next number."""
    for a, b, start in zip(expected, found, started, strict=True):
        if a.dtype is torch.bfloat16:
            differs = a != b
            assert differs.sum() <= 0.02 * a.numel()
            torch.testing.assert_close(b[differs], a[differs], rtol=2**-7, atol=1e-3)
        else:
            assert (a - b).norm() <= parity_tolerance(start, a, steps)


def carries_on(config, folder, mesh, placements, **load):
    """From the checkpoint that two processes have left, to where they went on."""
    model = Model(mesh, placements, fill=0.0)
    optimizer = config.make(model.named_parameters())
    states = state_dicts(model, optimizer)
    dcp.load(states, checkpoint_id=folder / config.name, **load)
    model.load(optimizer, states)
    for step in range(3, 6):
        model.step(optimizer, step)
    ends = [p.detach() if mesh is None else p.full_tensor() for p in model.parameters()]
    expected = torch.load(folder / f"{config.name}.pt")
    if config.row_sums:
        assert_same_numbers(ends, expected, expected, 6)
    else:
        assert_same_bits(ends, expected)


def state_dicts(model, optimizer):
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
