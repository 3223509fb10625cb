"""The multi-normalization kernel on a real GPU: against the reference on the same device, run to run, in every order of
tickets, on streams, in CUDA graphs.

Not part of `make test`: `make test-gpu` runs it, and fails where there is no GPU.
"""

import os

import numpy as np
import pytest
import torch

import parity
from buckets import FP32, moved
from lowmem_kernels import GradTransform
from lowmem_kernels.multinorm import launch
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision, assert_same_bits
from multinorm_buckets import NAMES, RULES, assert_same_buckets, make_bucket
from random_tickets import PHASED, random_order

DEVICE = torch.device("cuda")
#: As tests/gpu/test_tickets.py: random launches in all.
LAUNCHES = int(os.environ.get("LOWMEM_TICKET_LAUNCHES", "800"))
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: Lines of every width, held and read twice, in one piece or not; as many groups as there can be; small stacks.
PLANNED = [
    Case("wide", (40, 264)),
    Case("wide_stack", (3, 72, 1032)),
    Case("rows_of_4096", (600, 4096)),
    Case("rows_of_11008", (300, 11008)),
    Case("long_rows", (600, 16392)),
    Case("short_columns", (96, 20000)),
    Case("narrow", (4000, 24)),
    Case("small_stack", (600, 3, 8)),
    Case("ragged", (1030, 517)),
    Case("transposed_large", (1024, 2048), "transposed", "transposed"),
    Case("strided", (700, 300), "transposed", "contiguous"),
]
CASES = SHAPES + PLANNED


def on_gpu(precision=FP32, cases=CASES):
    bucket = make_bucket(cases, precision)
    for column in NAMES:
        setattr(bucket, column, [moved(t, DEVICE) for t in getattr(bucket, column)])
    return bucket


def run(bucket, name, steps=1, backend="triton", **options):
    for _ in range(steps):
        bucket.run(RULES[name], backend=backend, **options)
    return bucket


def tensor(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_reference(name, precision):
    """Roots are approximate on a GPU, by 2 units in the last place for each half-step."""
    # a row of equal numbers goes over a rounding boundary as a whole
    cases = [case for case in CASES if case.grad_layout != "expanded"]
    ours, reference = on_gpu(precision, cases), on_gpu(precision, cases)
    start = ours.copies()
    transform = GradTransform(clip_value=2e-3, clip_coef=tensor(0.7), inv_scale=tensor(0.9))
    run(ours, name, 3, transform=transform)
    run(reference, name, 3, "torch", transform=transform)
    for column, a, b, before in zip(NAMES, ours.columns(), reference.columns(), start, strict=True):
        for case, *tensors in zip(cases, a, b, before, strict=True):
            parity.assert_close(*tensors, 3, f"{column} of {case}", slack=4)
    assert [s.item() for s in ours.steps] == [s.item() for s in reference.steps]


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_runs_have_the_same_bits(name, precision):
    """Again, and at the same time on another stream."""
    first, second, third = (on_gpu(precision) for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run(second, name, 2)
    run(first, name, 2)
    torch.cuda.synchronize()
    run(third, name, 2)
    assert_same_buckets(second, first)
    assert_same_buckets(third, first)


@pytest.mark.parametrize("name", ["sinkgd", "table", "row_then_all"])
def test_random_launches_have_the_bits_of_the_phased_form(name, monkeypatch):
    """The scratch is full of NaN before each launch (tests/conftest.py), and the counters are those of the last."""
    random, start = np.random.default_rng(len(name)), on_gpu(BF16_SR)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "plan_order", lambda facts: PHASED)
        phased = run(on_gpu(BF16_SR), name)
    for _ in range(LAUNCHES // 30):
        bucket, order = on_gpu(BF16_SR, []), random_order(random)
        for column in NAMES:
            setattr(bucket, column, [moved(t, DEVICE) for t in getattr(start, column)])
        bucket.cases = start.cases
        with monkeypatch.context() as patch:
            patch.setattr(launch, "plan_order", lambda facts, order=order: order)
            run(bucket, name)
        assert_same_buckets(bucket, phased)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nonfinite_gradient_skips_its_parameter(value):
    whole, sound = on_gpu(BF16_SR, PLANNED), on_gpu(BF16_SR, PLANNED)
    bad = [0, 3, 7, 10]
    for i in bad:
        grad = whole.grads[i]
        grad[torch.unravel_index(torch.tensor(grad.numel() - 2), grad.shape)] = value
    start = [[x.clone() for x in column] for column in whole.columns()]
    transform = GradTransform(skipped=tensor(5))
    run(whole, "sinkgd", transform=transform)
    run(sound, "sinkgd")
    assert transform.skipped.item() == 5 + len(bad)
    for column, old in zip(whole.columns(), start, strict=True):
        for i in bad:
            assert_same_bits(column[i], old[i])
    good = [i for i in range(len(PLANNED)) if i not in bad]
    for a, b in zip(whole.only(good).params, sound.only(good).params, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", RULES)
def test_replayed_graph_equals_eager_steps(name):
    eager, captured = on_gpu(BF16_SR), on_gpu(BF16_SR)
    options = dict(lr=tensor(1e-3))
    run(eager, name, 5, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(captured, name, **options)  # compiles the kernels
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured, name, **options)
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    assert_same_buckets(captured, eager)


@pytest.mark.parametrize("name", RULES)
def test_a_step_does_not_wait_for_the_device(name):
    bucket = on_gpu(BF16_SR)
    transform = GradTransform(inv_scale=tensor(1.0), clip_coef=tensor(1.0), found_inf=tensor(0.0), skipped=tensor(0))
    options = dict(lr=tensor(1e-3), transform=transform)
    run(bucket, name, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(bucket, name, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
