"""Partial momentum on a real GPU: against the float64 oracle, run to run, without waiting, in CUDA graphs.

Not part of `make test`: `make test-gpu` runs it, and fails where there is no GPU.
"""

import numpy as np
import pytest
import torch

from buckets import moved
from lowmem_kernels import GradTransform
from lowmem_kernels.lowrank import MAX_RANK, MomentumRule
from lowmem_kernels.testing import SHAPES, Case, assert_parity, assert_same_bits
from lowrank_buckets import BF16_SR, FP32, HYPER, MOMENTA, SECONDS, expected_step, make_momentum_bucket, numpy64

DEVICE = torch.device("cuda")
#: Several blocks of rows and columns, spans that are not full, and a stack.
LARGE = [Case("wide", (320, 4104)), Case("tall", (2050, 64)), Case("square", (768, 768)), Case("experts", (5, 96, 200))]
#: Of the small ones, those whose gradients are nearly of lower rank are compared where it does not matter.
SMALL = [case for case in SHAPES if len(case.shape) >= 2 and case.name != "reversed_dims"]
RULES = {
    "power": MomentumRule(),
    "gd": MomentumRule("gd"),
    "fixed": MomentumRule("fixed", refresh=3),
    "rms": MomentumRule(update_clip=("rms", 0.5)),
    "elem": MomentumRule(update_clip=("elem", 0.75)),
}


def on_gpu(cases, momentum, second, precision=FP32):
    bucket = make_momentum_bucket(cases, momentum, second, precision)
    for name in ("params", "grads", "steps"):
        setattr(bucket, name, [moved(t, DEVICE) for t in getattr(bucket, name)])
    bucket.states = {name: [t.to(DEVICE) for t in tensors] for name, tensors in bucket.states.items()}
    return bucket


def check(bucket, rule):
    """One step against the oracle, with the bound of tests/lowrank_buckets.py, which three TF32 products keep to."""
    starts = [numpy64(p.cpu()) for p in bucket.params]
    grads = [numpy64(g.cpu()) for g in bucket.grads]
    steps = [int(s.item()) for s in bucket.steps]
    states = [{k: numpy64(v[i].cpu()) for k, v in bucket.states.items()} for i in range(len(starts))]
    bucket.run(rule=rule, backend="triton")
    for i, (p, g) in enumerate(zip(starts, grads, strict=True)):
        expected, _, largest = expected_step(p, g, states[i], steps[i] + 1, rule, HYPER)
        allowed = 2.0**-24 * (64 * HYPER["lr"] * largest + 4 * np.abs(p))
        if bucket.precision.param is torch.bfloat16:
            allowed = allowed + 2.0**-7 * np.maximum(np.abs(p), np.abs(expected))
        off = np.abs(numpy64(bucket.params[i].cpu()) - expected)
        assert (off <= allowed).all(), f"{bucket.cases[i]}: {np.max(off / np.maximum(allowed, 1e-30))} times the bound"
        assert bucket.steps[i].item() == steps[i] + 1


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_form_against_the_oracle(momentum, second, precision):
    check(on_gpu([*SMALL, *LARGE], momentum, second, precision), MomentumRule())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_rule_against_the_oracle(momentum, rule):
    check(on_gpu(LARGE, momentum, "element"), rule)


@pytest.mark.parametrize("rank", [1, 16, 17, 32, 33, MAX_RANK])
def test_every_rank_follows_torch(rank):
    """Products and small problems of every padded size, five steps, against the torch reference on the CPU."""
    buckets = [make_momentum_bucket([Case("a", (200, 328))], "lowrank", "element") for _ in range(2)]
    rows = torch.linalg.qr(torch.randn(328, rank, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
    for bucket in buckets:
        bucket.states["lefts"] = [torch.zeros(200, rank)]
        bucket.states["rights"] = [rows.clone()]
    ours, other = buckets
    start = other.params[0].clone()
    for name in ("params", "grads", "steps"):
        setattr(ours, name, [t.to(DEVICE) for t in getattr(ours, name)])
    ours.states = {name: [t.to(DEVICE) for t in tensors] for name, tensors in ours.states.items()}
    for step in range(5):
        grad = 1e-3 * torch.randn(200, 328, generator=torch.Generator().manual_seed(step))
        ours.grads[0].copy_(grad)
        other.grads[0].copy_(grad)
        ours.run(backend="triton")
        other.run(backend="torch")
    # momenta that cancel are ten times the update: 16 times what an update by itself would be allowed
    assert_parity(ours.params[0].cpu() / 16, other.params[0] / 16, start / 16, 5 * 16**2)
    right = ours.states["rights"][0]
    torch.testing.assert_close(right @ right.T, torch.eye(rank, device=DEVICE), rtol=0, atol=2e-3)


def test_two_runs_have_the_same_bits():
    first, second = (on_gpu([*SMALL, *LARGE], "lowrank", "factored", BF16_SR) for _ in range(2))
    rule = MomentumRule(update_clip=("rms", 0.5))
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            second.run(rule=rule, backend="triton")
    for _ in range(3):
        first.run(rule=rule, backend="triton")
    torch.cuda.synchronize()
    for a, b in zip(first.everything(), second.everything(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_call_does_not_wait_for_the_device(momentum):
    bucket = on_gpu(LARGE, momentum, "factored", BF16_SR)
    transform = GradTransform(skipped=torch.tensor(0, device=DEVICE), found_inf=torch.zeros((), device=DEVICE))
    rule = MomentumRule(update_clip=("rms", 0.5))
    bucket.run(rule=rule, transform=transform, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        bucket.run(rule=rule, transform=transform, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_graph_equals_eager_steps():
    eager, captured = (on_gpu(LARGE, "lowrank", "element", BF16_SR) for _ in range(2))
    for _ in range(4):
        eager.run(backend="triton")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        captured.run(backend="triton")  # compiles the kernels
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run(backend="triton")
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured.everything(), eager.everything(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("momentum", "second"), [("lowrank", "element"), ("full", "heads"), ("full", "cols")])
def test_a_parameter_that_is_not_finite_keeps_everything(momentum, second):
    bucket = on_gpu(LARGE, momentum, second)
    bucket.grads[1][5, 7] = torch.nan
    before = [t.clone() for t in bucket.part([1]).everything()]
    skipped = torch.tensor(0, device=DEVICE)
    bucket.run(transform=GradTransform(skipped=skipped), backend="triton")
    assert skipped.item() == 1
    for now, old in zip(bucket.part([1]).everything(), before, strict=True):
        assert_same_bits(now, old)


def test_memory_is_bounded():
    """Beside parameter, gradient and state: as much as the factors, and next to nothing else."""
    bucket = on_gpu([Case("a", (1024, 32768))], "lowrank", "rows", BF16_SR)
    bucket.run(backend="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bucket.run(backend="triton")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * 8 * (1024 + 32768) + 2**20
