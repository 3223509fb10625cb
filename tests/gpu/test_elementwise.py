"""The kernels on a real GPU: against the reference on the same device, run to run, on streams, in CUDA graphs.

Not part of `make test`: `make test-gpu` runs it, and fails where there is no GPU.
"""

from itertools import chain

import pytest
import torch

from buckets import make_bucket, moved
from lowmem_kernels import GradTransform
from lowmem_kernels.elementwise import grad_stats
from lowmem_kernels.testing import PRECISIONS, SHAPES, assert_same_bits, ulp
from lowmem_optim import AdamW, Lomo

DEVICE = torch.device("cuda")


def on_gpu(precision):
    bucket = make_bucket(SHAPES, precision)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"):
        setattr(bucket, name, [moved(t, DEVICE) for t in getattr(bucket, name)])
    return bucket


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_equals_the_reference(verb, precision):
    ours, reference, start = on_gpu(precision), on_gpu(precision), on_gpu(precision)
    transform = GradTransform(clip_value=2e-3, clip_coef=torch.tensor(0.7, device=DEVICE))
    for _ in range(3):
        ours.run(verb, transform=transform, backend="triton")
        reference.run(verb, transform=transform, backend="torch")
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        columns = (getattr(bucket, name) for bucket in (ours, reference, start))
        for case, a, b, before in zip(SHAPES, *columns, strict=True):
            # square root and division are approximate on a GPU (2 units in the last place each), and a value that lies
            # that close to a rounding boundary goes to the other neighbour: for each of three steps, one spacing of the
            # dtype and 8 of float32, at the size that the value had on its way
            size = torch.maximum(b.double().abs(), before.double().abs())
            allowed = 3 * (ulp(size, b.dtype) + 8 * ulp(size, torch.float32))
            assert ((a.double() - b.double()).abs() <= allowed).all(), (name, case)
    assert [s.item() for s in ours.steps] == [s.item() for s in reference.steps]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_two_runs_have_the_same_bits(precision):
    first, second = on_gpu(precision), on_gpu(precision)
    with torch.cuda.stream(torch.cuda.Stream()):
        second.adamw(backend="triton")
    first.adamw(backend="triton")
    torch.cuda.synchronize()
    for a, b in zip(chain(*first.columns()), chain(*second.columns()), strict=True):
        assert_same_bits(a, b)


def test_grad_stats_has_the_bits_of_its_definition():
    grads = [torch.randn(1000, 1003, device=DEVICE), torch.randn(77, device=DEVICE)]
    squares, nonfinite = grad_stats(grads, backend="triton").tolist()
    exact = sum(g.double().square().sum().item() for g in grads)
    # a million squares of one sign, added in a tree: far below one part in 1e5
    assert abs(squares - exact) <= 1e-5 * exact
    assert nonfinite == 0
    grads[1][5] = float("nan")
    assert grad_stats(grads, backend="triton")[1].item() == 1


@pytest.mark.parametrize(
    "make", [lambda p, **kw: AdamW(p, weight_decay=0.1, **kw), lambda p, **kw: Lomo(p, clip_grad_norm=1.0, **kw)]
)
def test_replayed_graph_equals_eager_steps(make):
    shapes = [(64, 64), (33, 17), (5,)]
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(s, generator=generator).to(DEVICE, torch.bfloat16) for s in shapes]
    grads = [torch.randn(s, generator=generator).to(DEVICE, torch.bfloat16) for s in shapes]

    def fresh():
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return params, make(params, lr=1e-2, capturable=True)

    eager, optimizer = fresh()
    for _ in range(5):
        optimizer.step()
    captured, optimizer = fresh()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        optimizer.step()  # compiles the kernels and creates the state
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(4):
        graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_a_step_does_not_wait_for_the_device():
    params = [torch.nn.Parameter(torch.ones(256, 256, device=DEVICE, dtype=torch.bfloat16)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizers = [AdamW(params, skip_nonfinite="step"), Lomo(params, clip_grad_norm=1.0)]
    for optimizer in optimizers:
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for optimizer in optimizers:
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
