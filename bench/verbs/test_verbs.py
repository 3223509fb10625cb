"""Microbenchmarks of the verbs over the matrices and vectors of one layer: `make bench-verbs`.

Of Llama 60M on a CPU, with one thread, and of Llama 7B on a GPU. Times are the clock's, from the call until the device
is done, and so include what the host does; caches are overwritten before each call. The bytes that a call requests, by
formula, are under extra_info of --benchmark-json=FILE.
"""

import pytest
import torch

from lowmem_kernels.testing.models import model_shapes
from lowmem_kernels.testing.verbs import make_call
from lowmem_optim.cli.loop import DTYPES, find_device
from lowmem_optim.cli.timing import Stopwatch

DEVICE = torch.device(find_device("auto"))
MODEL = {"cpu": "llama-60m", "cuda": "llama-7b"}[DEVICE.type]
ROUNDS = 20
#: Of testing.verbs those that differ in what they compute; with the sum of p² that an optimizer carries.
VERBS = ("adamw", "scaled_update", "grad_stats", "adafactor, RMS(p) carried", "came", "sinkgd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verb", VERBS)
def test_verb(benchmark, verb, dtype):
    torch.set_num_threads(1)
    shapes = [shape for name, shape in model_shapes(MODEL, 1).items() if ".layers." in name]
    call, stopwatch = make_call(verb, shapes, DTYPES[dtype], str(DEVICE)), Stopwatch(DEVICE)

    def until_done():
        call.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def flush():
        stopwatch.flush()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{MODEL}, one layer, {dtype}, {DEVICE}"
    params = call.tensors.get("params", call.tensors["grads"])
    before = [p.clone() for p in params]
    benchmark.pedantic(until_done, setup=flush, rounds=ROUNDS, warmup_rounds=2)
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert all(moved) if verb != "grad_stats" else not any(moved)
    benchmark.extra_info |= {"model": MODEL, "device": str(DEVICE), "requested_bytes": sum(call.formula)}
