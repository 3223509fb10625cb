"""The factored kernels on a real GPU: against the reference on the same device, run to run, on streams, in CUDA graphs.

Not part of `make test`: `make test-gpu` runs it, and fails where there is no GPU.
"""

from dataclasses import replace

import pytest
import torch

import parity
from buckets import FP32, moved
from factored_buckets import DIALECTS, NAMES, RULES, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision, assert_same_bits

DEVICE = torch.device("cuda")
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: Several groups, slabs and tiles; small matrices that share tickets; vectors of several groups; as many groups as
#: there can be, and more blocks of rows than groups.
PLANNED = [
    Case("wide", (40, 264)),
    Case("wide_stack", (3, 72, 1032)),
    Case("narrow", (4000, 24)),
    Case("small_stack", (600, 3, 8)),
    Case("ragged", (1030, 517)),
    Case("strided", (700, 300), "transposed", "contiguous"),
    Case("long_vector", (1_000_003,)),
    Case("many_rows", (5000, 1024)),
]
CASES = SHAPES + PLANNED
FEW = [case for case in CASES if case.name in ("seven", "odd_matrix", "experts", "transposed_param", "wide_stack")]


def on_gpu(name, precision=FP32, cases=CASES):
    bucket = make_bucket(cases, precision, verb=DIALECTS[name][0])
    for column in NAMES:
        tensors = [t if t is None else moved(t, DEVICE) for t in getattr(bucket, column)]
        setattr(bucket, column, tensors)
    return bucket


def run(bucket, name, steps=1, backend="triton", **options):
    verb, hyper = DIALECTS[name]
    for _ in range(steps):
        bucket.run(verb, backend=backend, **{**hyper, **options})
    return bucket


def tensor(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", DIALECTS)
def test_equals_the_reference(name, precision):
    """Roots and divisions are approximate on a GPU, by 2 units in the last place each, and are at most four in a row:
    fp32 results may be three times as far apart as elsewhere."""
    ours, reference = on_gpu(name, precision), on_gpu(name, precision)
    start = ours.copies()
    transform = GradTransform(clip_value=2e-3, clip_coef=tensor(0.7), inv_scale=tensor(0.9))
    run(ours, name, 3, transform=transform)
    run(reference, name, 3, "torch", transform=transform)
    for column, a, b, before in zip(NAMES, ours.columns(), reference.columns(), start, strict=True):
        for i, tensors in enumerate(zip(a, b, before, strict=True)):
            if tensors[0] is not None:
                parity.assert_close(*tensors, 3, f"{column} of {CASES[i]}", slack=3)
    assert [s.item() for s in ours.steps] == [s.item() for s in reference.steps]


@pytest.mark.parametrize("scale", [1.0, 3e-3, 1e-5, 1e-14])
@pytest.mark.parametrize("eps", [2.0**-23, 1e-30])
def test_the_floor_of_the_torch_dialect(eps, scale):
    """Felt by none, some or all elements; and squares of eps and of g that fp32 does not have."""
    rule = replace(RULES["torch"]["rule"], eps=(eps, 1e-3))
    transform = GradTransform(inv_scale=tensor(scale))
    ours, reference = on_gpu("torch", cases=FEW), on_gpu("torch", cases=FEW)
    for bucket in (ours, reference):
        for moment in (*bucket.rows, *bucket.cols):
            if moment is not None:
                moment.zero_()
    start = ours.copies()[0]
    run(ours, "torch", rule=rule, transform=transform)
    run(reference, "torch", 1, "torch", rule=rule, transform=transform)
    for case, a, b, before in zip(FEW, ours.params, reference.params, start, strict=True):
        parity.assert_close(a, b, before, 1, f"{case}", slack=3)


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("name", DIALECTS)
def test_runs_have_the_same_bits(name, precision):
    """Again, and at the same time on another stream."""
    first, second, third = (on_gpu(name, precision) for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run(second, name, 2)
    run(first, name, 2)
    torch.cuda.synchronize()
    run(third, name, 2)
    assert_same_buckets(second, first)
    assert_same_buckets(third, first)


@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_bits_do_not_depend_on_neighbours(name):
    together, others = run(on_gpu(name, BF16_SR), name), on_gpu(name, BF16_SR)
    for i in range(len(CASES)):
        alone = others.only([i])
        run(alone, name, rounding=together.rounding([i]))
        assert_same_buckets(alone, together.only([i]))


def test_carried_sums_have_the_bits_of_those_taken_anew():
    for name, precision in (("adalomo", BF16_SR), ("torch", FP32), ("relative", PRECISIONS[2])):
        carrying, forgetting = on_gpu(name, precision), on_gpu(name, precision)
        sums, others = ([tensor(torch.nan) for _ in CASES] for _ in range(2))
        for _ in range(3):
            run(carrying, name, param_sums=sums)
            run(forgetting, name, param_sums=others)
            assert_same_bits(torch.stack(sums), torch.stack(others))
            for other in others:
                other.fill_(torch.nan)
        assert_same_buckets(carrying, forgetting)


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e30])
@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_a_nonfinite_gradient_skips_its_parameter(name, value, precision):
    """No bit of it changes, and its neighbours do as if it had been sound."""
    whole, sound = on_gpu(name, precision, FEW), on_gpu(name, precision, FEW)
    bad, good = [0, 2, 3, 4], [1]
    for i in bad:
        grad = whole.grads[i]
        grad[torch.unravel_index(torch.tensor(grad.numel() - 2), grad.shape)] = value
    start = [[x if x is None else x.clone() for x in column] for column in whole.columns()]
    transform = GradTransform(skipped=tensor(5))
    run(whole, name, transform=transform)
    run(sound, name)
    assert transform.skipped.item() == 5 + len(bad)
    for column, old in zip(whole.columns(), start, strict=True):
        for i in bad:
            if column[i] is not None:
                assert_same_bits(column[i], old[i])
    assert_same_buckets(whole.only(good), sound.only(good))


@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_found_inf_leaves_everything(name):
    usual, same, untouched = (on_gpu(name, BF16_SR) for _ in range(3))
    run(same, name, transform=GradTransform(found_inf=tensor(1.0)))
    assert_same_buckets(same, untouched)
    run(same, name, transform=GradTransform(found_inf=tensor(0.0)))
    assert_same_buckets(same, run(usual, name))


@pytest.mark.parametrize("name", DIALECTS)
def test_replayed_graph_equals_eager_steps(name):
    eager, captured = on_gpu(name, BF16_SR), on_gpu(name, BF16_SR)
    options = dict(lr=tensor(1e-3))
    if name == "adalomo":
        options["param_sums"] = [tensor(torch.nan) for _ in CASES]
    run(eager, name, 5, **options)
    if "param_sums" in options:
        options["param_sums"] = [tensor(torch.nan) for _ in CASES]
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


@pytest.mark.parametrize("name", DIALECTS)
def test_a_step_does_not_wait_for_the_device(name):
    bucket = on_gpu(name, BF16_SR)
    transform = GradTransform(inv_scale=tensor(1.0), clip_coef=tensor(1.0), found_inf=tensor(0.0), skipped=tensor(0))
    options = dict(lr=tensor(1e-3), transform=transform)
    if DIALECTS[name][0] == "factored":
        options["param_sums"] = [tensor(torch.nan) for _ in CASES]
    run(bucket, name, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(bucket, name, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
