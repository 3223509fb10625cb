"""Whitening on a real GPU: against the float64 oracle, run to run, without waiting, in CUDA graphs, amid TF32.

Not part of `make test`: `make test-gpu` runs it, and fails where there is no GPU.
"""

import numpy as np
import pytest
import torch

from buckets import FP32, make_bucket, moved
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import Case, assert_same_bits
from lowmem_kernels.testing.oracles import whitening as exact
from lowmem_kernels.whitening import WhiteningRule, whiten_, whitened
from whitening_buckets import BF16_SR, CASES, HYPER, RULES, exact_d, numpy64

DEVICE = torch.device("cuda")
SWAN = WhiteningRule()
#: Gram matrices of several tiles of 64 and of 128 on either side.
LARGE = [
    Case("wide", (320, 1000)),
    Case("tall", (1000, 320)),
    Case("wide_128", (640, 1288)),
    Case("square", (768, 768)),
]


def on_gpu(cases, precision):
    bucket = make_bucket(cases, precision)
    for name in ("params", "grads", "steps"):
        setattr(bucket, name, [moved(t, DEVICE) for t in getattr(bucket, name)])
    return bucket


def run(bucket, rule=SWAN, backend="triton", **options):
    options = {**HYPER, "rounding": bucket.rounding(), **options}
    whiten_(bucket.params, bucket.grads, bucket.steps, rule=rule, backend=backend, **options)


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_against_the_oracle(name, precision):
    """As in the interpreter; with TF32 products only those of "polynomial" may be off by 11 bits, 5 % of D."""
    cases = [c for c in CASES if RULES[name].get("conv") or len(c.shape) < 4]
    bucket = on_gpu([*cases, *LARGE], precision)
    start = bucket.copies()
    run(bucket, WhiteningRule(**RULES[name]))
    fast = RULES[name].get("solver") == "polynomial"
    for p, old, grad in zip(bucket.params, start[0], start[1], strict=True):
        d, error = exact_d(grad.cpu(), RULES[name])
        if p.numel() == 0:
            continue
        old = numpy64(old.cpu())
        expected = exact.update(old, d, **HYPER)
        allowed = HYPER["lr"] * HYPER["scale"] * error + 2.0**-22 * np.abs(old)
        if precision.param is torch.bfloat16:
            allowed += 2.0**-7 * np.maximum(np.abs(old), np.abs(expected))
        off = np.abs(numpy64(p.cpu()) - expected)
        if fast:
            moved_by = np.linalg.norm(expected - old)
            assert np.linalg.norm(np.maximum(off - allowed, 0)) <= 0.05 * moved_by
        else:
            assert (off <= allowed).all()


def test_two_runs_have_the_same_bits():
    first, second = (on_gpu([*CASES, *LARGE], BF16_SR) for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()):
        run(second)
    run(first)
    torch.cuda.synchronize()
    for a, b in zip(first.params, second.params, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_what_the_program_asks_for_does_not_matter(precision):
    """A program that trains with TF32 must not make the coupled iteration explode."""
    usual, other = (on_gpu(LARGE, FP32) for _ in range(2))
    run(usual)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        run(other)
        assert torch.backends.cuda.matmul.fp32_precision == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for a, b in zip(other.params, usual.params, strict=True):
        assert_same_bits(a, b)


def test_a_call_does_not_wait_for_the_device():
    bucket = on_gpu([*CASES, *LARGE], BF16_SR)
    transform = GradTransform(skipped=torch.tensor(0, device=DEVICE), found_inf=torch.zeros((), device=DEVICE))
    run(bucket, transform=transform)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(bucket, transform=transform)
        whitened(bucket.grads, rule=WhiteningRule())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_graph_equals_eager_steps():
    eager, captured = (on_gpu(LARGE[:2], BF16_SR) for _ in range(2))
    for _ in range(4):
        run(eager)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(captured)  # compiles the kernels
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured.params, eager.params, strict=True):
        assert_same_bits(a, b)


def test_a_parameter_that_is_not_finite_keeps_everything():
    bucket = on_gpu(LARGE, FP32)
    bucket.grads[1][5, 7] = torch.nan
    before = bucket.copies()
    skipped = torch.tensor(0, device=DEVICE)
    run(bucket, transform=GradTransform(skipped=skipped))
    assert skipped.item() == 1
    assert_same_bits(bucket.params[1], before[0][1])
    assert [s.item() - t.item() for s, t in zip(bucket.steps, before[4], strict=True)] == [1, 0, 1, 1]


def test_memory_is_bounded():
    """Beside parameter and gradient: the K x K matrices of one group, and next to nothing else."""
    param = torch.zeros(1024, 65536, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn_like(param)
    steps = [torch.zeros((), device=DEVICE)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whiten_([param], [grad], steps, rule=WhiteningRule(), backend="triton", **HYPER)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 7 * 4 * 1024**2 + 2**20
