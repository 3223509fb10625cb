"""The projection kernels on a real GPU: against the reference on the same device, run to run, in every order of
tickets, on streams, in CUDA graphs, and projections against those of a CPU.

Not part of `make test`: `make test-gpu` runs it, and fails where there is no GPU.
"""

import os

import numpy as np
import pytest
import torch

import parity
from buckets import FP32, SEED, moved
from lowmem_kernels import GradTransform
from lowmem_kernels.projection import ApolloRule, Draw, launch, projection_matrix
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision, assert_same_bits
from projection_buckets import NAMES, RULES, assert_same_buckets, make_bucket
from random_tickets import PHASED, random_order

DEVICE = torch.device("cuda")
#: As tests/gpu/test_tickets.py: random launches in all.
LAUNCHES = int(os.environ.get("LOWMEM_TICKET_LAUNCHES", "800"))
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: Several bundles and groups, both sides, tall and wide, small stacks, ragged and strided.
PLANNED = [
    Case("square", (2048, 2048)),
    Case("tall", (3000, 520)),
    Case("wide", (520, 3000)),
    Case("experts", (3, 72, 1032)),
    Case("small_stack", (600, 8, 24)),
    Case("ragged", (1030, 517)),
    Case("transposed_large", (1024, 2048), "transposed", "transposed"),
    Case("strided", (700, 300), "transposed", "contiguous"),
]
CASES = SHAPES + PLANNED
ALL_RULES = {**RULES, "rank_256": ApolloRule(256), "rank_300": ApolloRule(300, "tensor")}


def on_gpu(name, precision=FP32, cases=CASES):
    bucket = make_bucket(cases, ALL_RULES[name], precision)
    for column in NAMES:
        setattr(bucket, column, [moved(t, DEVICE) for t in getattr(bucket, column)])
    return bucket


def run(bucket, name, steps=1, backend="triton", **options):
    for k in range(steps):
        bucket.run(ALL_RULES[name], backend=backend, **{"epoch": 1 + k // 2, **options})
    return bucket


def tensor(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize(("rank", "source"), [(1, "gaussian"), (256, "gaussian"), (64, "rademacher")])
def test_projections_are_those_of_a_cpu(rank, source):
    """The same bits: training goes on with the same projections wherever it is resumed."""
    draw = Draw(source, SEED, [2**50 + 1], 11)
    ours = projection_matrix((5000, 4099), rank=rank, draw=draw, device=DEVICE, backend="triton")
    assert_same_bits(ours.cpu(), projection_matrix((5000, 4099), rank=rank, draw=draw))
    assert_same_bits(ours, projection_matrix((5000, 4099), rank=rank, draw=draw, device=DEVICE, backend="torch"))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ALL_RULES)
def test_equals_the_reference(name, precision):
    """Roots are approximate on a GPU, and sums of thousands of products in another order."""
    cases = [case for case in CASES if case.grad_layout != "expanded"]
    ours, reference = on_gpu(name, precision, cases), on_gpu(name, precision, cases)
    start = ours.copies()
    transform = GradTransform(clip_coef=tensor(0.7), inv_scale=tensor(0.9))
    # the reference multiplies matrices by cuBLAS, in fp32
    torch.backends.cuda.matmul.allow_tf32 = False
    run(ours, name, 3, transform=transform)
    run(reference, name, 3, "torch", transform=transform)
    for column, a, b, before in zip(NAMES, ours.columns(), reference.columns(), start, strict=True):
        for case, *tensors in zip(cases, a, b, before, strict=True):
            parity.assert_close(*tensors, 3, f"{column} of {case}", slack=16)
    assert [s.item() for s in ours.steps] == [s.item() for s in reference.steps]


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("name", ["mini", "rank_24", "rank_256", "full"])
def test_runs_have_the_same_bits(name, precision):
    """Again, and at the same time on another stream, which has projections of its own."""
    first, second, third = (on_gpu(name, precision) for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run(second, name, 2)
    run(first, name, 2)
    torch.cuda.synchronize()
    run(third, name, 2)
    assert_same_buckets(second, first)
    assert_same_buckets(third, first)


@pytest.mark.parametrize("name", ["mini", "rank_24", "full"])
def test_random_launches_have_the_bits_of_the_phased_form(name, monkeypatch):
    """The scratch is full of NaN before each launch (tests/conftest.py), and the counters are those of the last."""
    random, start = np.random.default_rng(len(name)), on_gpu(name, BF16_SR)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "plan_order", lambda facts: PHASED)
        phased = run(on_gpu(name, BF16_SR), name)
    for _ in range(LAUNCHES // 30):
        bucket, order = on_gpu(name, BF16_SR, []), random_order(random)
        for column in NAMES:
            setattr(bucket, column, [moved(t, DEVICE) for t in getattr(start, column)])
        bucket.cases = start.cases
        with monkeypatch.context() as patch:
            patch.setattr(launch, "plan_order", lambda facts, order=order: order)
            run(bucket, name)
        assert_same_buckets(bucket, phased)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["mini", "rank_24"])
def test_a_nonfinite_gradient_skips_its_parameter(name, value):
    whole, sound = on_gpu(name, BF16_SR, PLANNED), on_gpu(name, BF16_SR, PLANNED)
    bad = [0, 3, 7]
    for i in bad:
        grad = whole.grads[i]
        grad[torch.unravel_index(torch.tensor(grad.numel() - 2), grad.shape)] = value
    start = [[x.clone() for x in column] for column in whole.columns()]
    transform = GradTransform(skipped=tensor(5))
    run(whole, name, transform=transform)
    run(sound, name)
    assert transform.skipped.item() == 5 + len(bad)
    for column, old in zip(whole.columns(), start, strict=True):
        for i in bad:
            assert_same_bits(column[i], old[i])
    good = [i for i in range(len(PLANNED)) if i not in bad]
    for a, b in zip(whole.only(good).params, sound.only(good).params, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", ["mini", "rank_24", "full"])
def test_replayed_graph_equals_eager_steps(name):
    """An epoch on the device changes between replays, and projections with it."""
    eager, captured = on_gpu(name, BF16_SR), on_gpu(name, BF16_SR)
    for epoch in (1, 1, 2, 2, 3):
        run(eager, name, lr=tensor(1e-3), epoch=tensor(epoch))
    now, options = tensor(1), dict(lr=tensor(1e-3))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(captured, name, epoch=now, **options)  # compiles the kernels
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured, name, epoch=now, **options)
    for epoch in (1, 2, 2, 3):
        now.fill_(epoch)
        graph.replay()
    torch.cuda.synchronize()
    assert_same_buckets(captured, eager)


@pytest.mark.parametrize("name", ["mini", "rank_24", "rank_256", "full"])
def test_a_step_does_not_wait_for_the_device(name):
    bucket = on_gpu(name, BF16_SR)
    transform = GradTransform(inv_scale=tensor(1.0), clip_coef=tensor(1.0), found_inf=tensor(0.0), skipped=tensor(0))
    options = dict(lr=tensor(1e-3), transform=transform, epoch=tensor(4))
    run(bucket, name, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(bucket, name, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
