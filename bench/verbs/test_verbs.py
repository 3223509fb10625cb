"""Microbenchmarks of the verbs over the matrices and vectors of one layer: `make bench-verbs`.

Of Llama 60M on a CPU, with one thread, and of Llama 7B on a GPU. Times are the clock's, from the call until the device
is done, and so include what the host does; caches are overwritten before each call. The bytes that a call requests, by
formula, are under extra_info of --benchmark-json=FILE.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowmem_kernels import Rounding
from lowmem_kernels.elementwise import adamw_, grad_stats, scaled_update_
from lowmem_kernels.factored import FactoredRule, confidence_update_, factored_update_
from lowmem_kernels.testing import bytes_moved
from lowmem_kernels.testing.models import model_shapes
from lowmem_optim.cli.contenders import make_tensors
from lowmem_optim.cli.loop import DTYPES, find_device
from lowmem_optim.cli.timing import Stopwatch

DEVICE = torch.device(find_device("auto"))
MODEL = {"cpu": "llama-60m", "cuda": "llama-7b"}[DEVICE.type]
ROUNDS = 20
# name to the formulas of the bytes of matrices and vectors, and the itemsize of the state
FORMULAS = {
    "adamw_": ("adamw", "adamw", 4),
    "scaled_update_": ("scaled_update", "scaled_update", 0),
    "grad_stats": ("grad_stats", "grad_stats", 0),
    "factored_update_": ("factored", "factored_vector", 0),
    "confidence_update_": ("confidence", "confidence_vector", 4),
}


@dataclass
class Layer:
    """A layer's parameters and gradients, and room for states: zeros of any shape, float32."""

    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    rounding: Rounding

    def full(self) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=torch.float32) for p in self.params]

    def rows(self) -> list[Tensor]:
        return [p.new_zeros(p.shape[:-1] if p.ndim > 1 else p.shape, dtype=torch.float32) for p in self.params]

    def cols(self) -> list[Tensor | None]:
        shapes = [(*p.shape[:-2], p.shape[-1]) if p.ndim > 1 else None for p in self.params]
        return [s and torch.zeros(s, device=DEVICE) for s in shapes]


@pytest.fixture(params=DTYPES)
def layer(request):
    torch.set_num_threads(1)
    shapes = {name: shape for name, shape in model_shapes(MODEL, 1).items() if ".layers." in name}
    params, grads = make_tensors(shapes, DTYPES[request.param], DEVICE)
    steps = [torch.zeros((), device=DEVICE) for _ in params]
    return Layer(params, grads, steps, Rounding(request.param == "bf16", seed=0, uids=list(range(len(params)))))


def call_of(verb, layer):
    """The verb on the layer, without arguments."""
    params, grads, steps, rounding = layer.params, layer.grads, layer.steps, layer.rounding
    options = {"lr": 1e-3, "weight_decay": 0.01, "rounding": rounding}
    if verb == "adamw_":
        first, second = layer.full(), layer.full()
        return lambda: adamw_(params, grads, first, second, steps, betas=(0.9, 0.99), eps=1e-8, **options)
    if verb == "scaled_update_":
        return lambda: scaled_update_(params, grads, steps, **options)
    if verb == "grad_stats":
        return lambda: grad_stats(grads)
    rows, cols = layer.rows(), layer.cols()
    if verb == "factored_update_":
        # without the parameter's RMS, which an optimizer carries from step to step
        rule = FactoredRule(scale_parameter=False)
        return lambda: factored_update_(params, grads, rows, cols, steps, rule=rule, **options)
    momenta = layer.full()
    res = [r if c is not None else None for r, c in zip(layer.rows(), cols, strict=True)]
    state = (momenta, rows, cols, res, layer.cols(), steps)
    came = {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "clip_threshold": 1.0}
    return lambda: confidence_update_(params, grads, *state, **came, **options)


@pytest.mark.parametrize("verb", FORMULAS)
def test_verb(benchmark, verb, layer):
    call, stopwatch = call_of(verb, layer), Stopwatch(DEVICE)

    def until_done():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def flush():
        stopwatch.flush()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{MODEL}, one layer, {str(layer.params[0].dtype).removeprefix('torch.')}, {DEVICE}"
    before = [p.clone() for p in layer.params]
    benchmark.pedantic(until_done, setup=flush, rounds=ROUNDS, warmup_rounds=2)
    moved = [not torch.equal(a, b) for a, b in zip(before, layer.params, strict=True)]
    assert all(moved) if verb != "grad_stats" else not any(moved)

    matrices, vectors, state = FORMULAS[verb]
    requested = [
        sum(bytes_moved(matrices if p.ndim > 1 else vectors, p.numel(), p.element_size(), state)) for p in layer.params
    ]
    benchmark.extra_info |= {"model": MODEL, "device": str(DEVICE), "requested_bytes": sum(requested)}
