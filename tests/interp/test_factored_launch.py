"""Bits that depend on nothing else, memory outside the tensors, launches, counters, and races between programs."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import parity
from buckets import FP32, counters_at_zero, fenced
from factored_buckets import DIALECTS, NAMES, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform, schedules
from lowmem_kernels.factored import launch, schedule
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits
from races import no_races

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: One of each layout and tile; several groups, slabs and matrices, and small ones that share a ticket.
VARIED = [
    *(case for case in SHAPES if case.name in ("scalar", "empty", "seven", "odd_matrix", "transposed")),
    Case("wide_stack", (2, 24, 136)),
    Case("ragged", (17, 67)),
    Case("channels_last", (2, 2, 3, 2), "channels_last", "channels_last"),
    Case("long_vector", (9000,)),
]
#: Parameters and gradients in other places than their neighbours.
FENCED = [
    *(case for case in SHAPES if case.name in ("seven", "experts_transposed", "misaligned_block_plus_1")),
    *(case for case in SHAPES if case.name in ("columns_of_wider", "transposed_param", "expanded_grad")),
    *VARIED[-4:-1],
]
#: With a momentum; with a scaled step, and a floor; with a residual.
EVERY_KERNEL = ["external", "torch", "came"]


@pytest.fixture(autouse=True)
def _counters_are_zero_after_each_launch(monkeypatch):
    with counters_at_zero(monkeypatch, schedules):
        yield


@pytest.fixture
def _schedules_made_anew():
    """For tests that change how work is cut."""
    launch._schedules_of.cache_clear()
    yield
    launch._schedules_of.cache_clear()


def run(bucket, name, steps=1, backend="triton", **options):
    """Steps of a dialect, in which the floor of torch's is felt by some elements."""
    verb, hyper = DIALECTS[name]
    transform = GradTransform(clip_coef=torch.tensor(3e-3 if name == "torch" else 1.0))
    for _ in range(steps):
        bucket.run(verb, backend=backend, **{**hyper, "transform": transform, **options})
    return bucket


def bucket_of(name, precision=BF16_SR, cases=VARIED):
    return make_bucket(cases, precision, verb=DIALECTS[name][0])


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_bits_do_not_depend_on_neighbours_or_the_run(name):
    together, others = run(bucket_of(name), name), bucket_of(name)
    for i in range(len(VARIED)):
        alone = others.only([i])
        run(alone, name, rounding=together.rounding([i]))
        assert_same_buckets(alone, together.only([i]))


@pytest.mark.usefixtures("_schedules_made_anew")
@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_bits_do_not_depend_on_the_bundles_of_a_list(name, monkeypatch):
    """Where scratch is for one parameter at a time, each is a bundle of its own."""
    usual = run(bucket_of(name), name)
    launch._schedules_of.cache_clear()
    monkeypatch.setattr(schedule, "SCRATCH_BYTES", 0)
    assert_same_buckets(run(bucket_of(name), name), usual)


SEVERAL_BLOCKS = [
    *(case for case in SHAPES if case.name in ("tile_less_1", "experts")),
    Case("wide_stack", (2, 40, 136)),
    Case("narrow", (390, 8)),
    Case("strided", (130, 20), "transposed", "contiguous"),
    Case("long_vector", (12300,)),
    Case("small_stack", (7, 3, 8)),
]


@pytest.mark.usefixtures("_schedules_made_anew")
@pytest.mark.parametrize(("limit", "value"), [("MAX_GROUPS", 2), ("SMALL_TILES", 3)])
@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_larger_groups_and_smaller_batches(name, limit, value, monkeypatch):
    """Groups of several blocks of rows, whose column sums a program adds up in memory; matrices that share a ticket."""
    monkeypatch.setattr(schedule, limit, value)
    expected, actual = (bucket_of(name, FP32, SEVERAL_BLOCKS) for _ in range(2))
    start = expected.copies()
    run(actual, name)
    run(expected, name, backend="torch")
    for column_name, column, other, old in zip(NAMES, actual.columns(), expected.columns(), start, strict=True):
        for i, tensors in enumerate(zip(column, other, old, strict=True)):
            if tensors[0] is not None:
                parity.assert_close(*tensors, 1, f"{column_name} of {SEVERAL_BLOCKS[i]}")


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_programs_share_memory_in_order_only(name):
    """In torch's dialect with a sum of p² that is carried, NaN at first."""
    sums = {"param_sums": [torch.tensor(torch.nan) for _ in VARIED]} if name == "torch" else {}
    with no_races():
        run(bucket_of(name), name, steps=2 if sums else 1, **sums)


@pytest.mark.parametrize(("precision", "poison"), [(FP32, -1), (BF16_SR, 0x4242)], ids=["fp32_nan", "bf16_numbers"])
@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_nothing_outside_the_tensors_matters_or_changes(name, precision, poison):
    """Between 4 KB of garbage on both sides, and garbage between strided elements: same bits, no stores there."""
    plain, fenced_in = (bucket_of(name, precision, FENCED) for _ in range(2))
    fences = []
    for column in fenced_in.columns():
        for i, tensor in enumerate(column):
            if tensor is not None:
                column[i], storage, outside = fenced(tensor, poison)
                fences.append((storage, outside, storage[outside].clone()))
    run(plain, name)
    run(fenced_in, name)
    assert_same_buckets(fenced_in, plain)
    for storage, outside, before in fences:
        assert_same_bits(storage[outside], before)


LAYOUTS = [
    Case("contiguous", (5, 7)),
    Case("aligned", (9, 8)),
    Case("wide", (2, 72)),
    Case("vector", (16,)),
    Case("transposed", (4, 3), "transposed", "transposed"),
]


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_launches_do_not_grow_with_parameters(name, monkeypatch):
    """One launch for each layout and tile. Kernels are counted, not run."""
    launches = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launches.append(self.__name__))
    for layouts, kinds in ((LAYOUTS[:1], 1), (LAYOUTS, 4)):
        counts = []
        for count in (6, 60, 291):
            launches.clear()
            run(bucket_of(name, cases=(layouts * count)[:count]), name)
            counts.append(len(launches))
        assert counts == [kinds] * 3


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_autograd_knows_that_parameters_changed(name):
    bucket = bucket_of(name, cases=SHAPES[:3])
    versions = [param._version for param in bucket.params]
    run(bucket, name)
    assert all(param._version > old for param, old in zip(bucket.params, versions, strict=True))
