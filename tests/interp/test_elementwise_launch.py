"""What no result shows: bits that depend on nothing else, memory outside the tensors, launches, bytes, counters."""

import math

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from buckets import FP32, NAMES, VARIED, Bucket, assert_same_buckets, counters_at_zero, fenced, make_bucket
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.elementwise import grad_stats, launch
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits, bytes_moved, make_tensors
from lowmem_kernels.testing.bytecount import count_bytes

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
VERBS = ["adamw", "scaled_update"]


@pytest.fixture(autouse=True)
def _counters_are_zero_after_each_launch(monkeypatch):
    with counters_at_zero(monkeypatch, launch):
        yield


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_bits_do_not_depend_on_neighbours(verb, precision):
    together = make_bucket(VARIED, precision)
    together.run(verb, backend="triton")
    for i in range(len(VARIED)):
        whole = make_bucket(VARIED, precision)
        alone = Bucket(*([column[i]] for column in whole.columns()), precision)
        uid = whole.rounding().uids[i]
        alone.run(verb, backend="triton", rounding=Rounding(precision.stochastic, whole.rounding().seed, [uid]))
        for name, a, b in zip(NAMES, alone.columns(), together.columns(), strict=True):
            assert_same_bits(a[0], b[i], f"{name} of {VARIED[i]}")


@pytest.mark.parametrize(("tile", "block"), [(4096, 512), (512, 256)])
@pytest.mark.parametrize("verb", VERBS)
def test_bits_do_not_depend_on_the_plan(verb, tile, block, monkeypatch):
    usual, other = (make_bucket(VARIED, BF16_SR) for _ in range(2))
    usual.run(verb, backend="triton")
    monkeypatch.setattr(launch, "plan_tile", lambda numel: tile)
    monkeypatch.setattr(launch, "plan_elementwise", lambda *_: launch.ElementwisePlan(tile, block, 4))
    other.run(verb, backend="triton")
    assert_same_buckets(other, usual)


def test_long_tiles_are_planned_for_large_totals_only():
    assert launch.plan_tile(2**24 - 1) == 2048
    assert launch.plan_tile(2**24) == 16384


@pytest.mark.parametrize("verb", VERBS)
def test_bits_do_not_depend_on_the_run(verb):
    one, two = (make_bucket(VARIED, BF16_SR) for _ in range(2))
    for bucket in (one, two):
        bucket.run(verb, backend="triton")
    assert_same_buckets(one, two)


@pytest.mark.parametrize(("precision", "poison"), [(FP32, -1), (BF16_SR, 0x4242)], ids=["fp32_nan", "bf16_numbers"])
@pytest.mark.parametrize("verb", [*VERBS, "grad_stats"])
def test_nothing_outside_the_tensors_matters_or_changes(verb, precision, poison):
    """Between 4 KB of garbage on both sides, and garbage between strided elements: same bits, no stores there."""
    cases = [case for case in SHAPES if math.prod(case.shape) < 600 or case.name == "tile_plus_1"]
    plain, fenced_in = (make_bucket(cases, precision) for _ in range(2))
    fences = []
    for column in fenced_in.columns():
        for i, tensor in enumerate(column):
            column[i], storage, outside = fenced(tensor, poison)
            fences.append((storage, outside, storage[outside].clone()))
    if verb == "grad_stats":
        results = [grad_stats(bucket.grads, backend="triton") for bucket in (plain, fenced_in)]
        assert_same_bits(*results)
    else:
        plain.run(verb, backend="triton")
        fenced_in.run(verb, backend="triton")
    assert_same_buckets(fenced_in, plain)
    for storage, outside, before in fences:
        integer = {2: torch.int16, 4: torch.int32}[storage.element_size()]
        assert torch.equal(storage[outside].view(integer), before.view(integer))


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("verb", [*VERBS, "grad_stats"])
def test_bytes_equal_the_formula(verb, case):
    """Every element is read and written once, tails and misaligned tensors included; only tables come on top."""
    bucket = make_bucket([case], Precision(torch.bfloat16, torch.bfloat16, torch.float32))
    named = dict(zip(NAMES, bucket.columns(), strict=True))
    skipped = torch.tensor(0)
    with count_bytes(named) as traffic:
        if verb == "grad_stats":
            grad_stats(bucket.grads, backend="triton")
        else:
            bucket.run(verb, backend="triton", transform=GradTransform(skipped=skipped))
    columns = {"adamw": NAMES[:4], "scaled_update": NAMES[:2], "grad_stats": NAMES[1:2]}[verb]
    itemsizes = bucket.params[0].element_size(), bucket.exp_avgs[0].element_size()
    read, written = bytes_moved(verb, bucket.params[0].numel(), *itemsizes)
    assert sum(traffic.read[name] for name in NAMES[:4]) == read
    assert sum(traffic.written[name] for name in NAMES[:4]) == written
    for name in columns:
        assert traffic.read[name] == named[name][0].numel() * named[name][0].element_size()
    assert not any(traffic.atomic[name] for name in NAMES)
    assert traffic.written["grads"] == 0
    assert traffic.written["steps"] == (0 if verb == "grad_stats" else 4)
    if verb != "grad_stats":
        # the table: 9 words find the row, 2 to 5 addresses; strided tensors add 3 words a dimension to each block
        programs = max(1, -(-bucket.params[0].numel() // 2048))
        assert traffic.read["other"] <= programs * 8 * (16 + 8 * 2 * 2 * 15)


@pytest.mark.parametrize("verb", [*VERBS, "grad_stats"])
def test_launches_do_not_grow_with_parameters(verb, monkeypatch):
    """One launch for each layout: 6 parameters or 60. Kernels are counted, not run."""
    launches = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launches.append(self.__name__))
    layouts = [
        Case("contiguous", (5, 7)),
        Case("misaligned", (9,), "misaligned", "misaligned"),
        Case("transposed", (4, 3), "transposed", "transposed"),
    ]
    for kinds in (1, 3):
        counts = []
        for copies in (6 // kinds, 60 // kinds):
            bucket = make_bucket(layouts[:kinds] * copies)
            launches.clear()
            if verb == "grad_stats":
                grad_stats(bucket.grads, backend="triton")
            else:
                bucket.run(verb, backend="triton")
            counts.append(len(launches))
        assert counts == [kinds, kinds]


@pytest.mark.parametrize("verb", VERBS)
def test_autograd_knows_that_parameters_changed(verb):
    bucket = make_bucket(SHAPES[:3])
    versions = [param._version for param in bucket.params]
    bucket.run(verb, backend="triton")
    assert all(param._version > old for param, old in zip(bucket.params, versions, strict=True))


def test_grad_stats_with_more_tiles_than_programs(monkeypatch):
    """Programs that own several tiles, and the same bits however often it runs."""
    monkeypatch.setattr(launch, "STATS_PROGRAMS", 4)
    grads = [make_tensors(case, torch.float32, i)[1] for i, case in enumerate(SHAPES)]
    result = grad_stats(grads, backend="triton")
    squares = sum(g.double().square().sum().item() for g in grads)
    assert abs(result[0].item() - squares) <= 64 * 2.0**-24 * squares
    assert_same_bits(grad_stats(grads, backend="triton"), result)
