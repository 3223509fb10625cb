"""Bits that depend on nothing else, memory outside the tensors, launches, waits and races between programs, bytes."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from buckets import FP32, counters_at_zero, fenced
from lowmem_kernels import schedules
from lowmem_kernels.multinorm import NormRule, kernels, launch
from lowmem_kernels.multinorm.fields import SLAB
from lowmem_kernels.multinorm.schedule import MAX_GROUPS
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits, bytes_moved
from lowmem_kernels.testing.bytecount import count_bytes
from multinorm_buckets import NAMES, RULES, assert_same_buckets, make_bucket
from races import no_races
from ticket_contract import Family

BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.float32)
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: One of each layout; several groups, slabs and matrices.
VARIED = [
    *(case for case in SHAPES if case.name in ("empty", "seven", "odd_matrix", "transposed", "columns_of_wider")),
    Case("wide_stack", (2, 34, 264)),
    Case("channels_last", (2, 2, 3, 2), "channels_last", "channels_last"),
]
#: Sums over lines twice; all of a rule's kinds of reads; none but the last.
EVERY_KIND = ["column_first", "table", "row_then_all", "row"]
#: One route, so one launch, for a rule that begins with rows; a bundle each, so that slots of the scratch are reused.
CASES = [Case("matrix", (34, 264)), Case("small", (18, 264)), Case("stack", (2, 3, 264)), Case("last", (2, 2, 264))]


def run(name, precision=BF16_SR, cases=VARIED, **options):
    bucket = make_bucket(cases, precision)
    bucket.run(RULES[name], backend="triton", **options)
    return bucket


@pytest.mark.parametrize("name", EVERY_KIND)
def test_bits_do_not_depend_on_neighbours_or_the_run(name, monkeypatch):
    with counters_at_zero(monkeypatch, schedules):
        together, others = run(name), make_bucket(VARIED, BF16_SR)
        for i in range(len(VARIED)):
            alone = others.only([i])
            alone.run(RULES[name], backend="triton", rounding=together.rounding([i]))
            assert_same_buckets(alone, together.only([i]))


@pytest.mark.parametrize("name", EVERY_KIND)
def test_programs_share_memory_in_order_only(name):
    with no_races():
        run(name)


@pytest.mark.parametrize(("precision", "poison"), [(FP32, -1), (BF16_SR, 0x4242)], ids=["fp32_nan", "bf16_numbers"])
@pytest.mark.parametrize("name", ["column_first", "table"])
def test_nothing_outside_the_tensors_matters_or_changes(name, precision, poison):
    """Between 4 KB of garbage on both sides, and garbage between strided elements: same bits, no stores there."""
    plain, fenced_in = (make_bucket(VARIED, precision) for _ in range(2))
    fences = []
    for column in fenced_in.columns():
        for i, tensor in enumerate(column):
            column[i], storage, outside = fenced(tensor, poison)
            fences.append((storage, outside, storage[outside].clone()))
    for bucket in (plain, fenced_in):
        bucket.run(RULES[name], backend="triton")
    assert_same_buckets(fenced_in, plain)
    for storage, outside, before in fences:
        assert_same_bits(storage[outside], before)


LAYOUTS = [
    Case("contiguous", (2, 5, 7)),
    Case("wide", (65, 136)),
    Case("transposed", (4, 3), "transposed", "transposed"),
    Case("strided", (4, 3), "transposed", "contiguous"),
]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_launches_do_not_grow_with_parameters(name, monkeypatch):
    """One for each route. Kernels are counted, not run."""
    launches = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launches.append(self.__name__))
    for layouts in (LAYOUTS[:1], LAYOUTS):
        for count in (6, 60, 291):
            launches.clear()
            run(name, cases=(layouts * count)[:count])
            assert launches == ["_multinorm_kernel"] * len(layouts)


def test_autograd_knows_that_parameters_changed():
    bucket = make_bucket(VARIED)
    versions = [param._version for param in bucket.params]
    bucket.run(RULES["once"], backend="triton")
    assert all(param._version > old for param, old in zip(bucket.params, versions, strict=True))


FAMILY = Family(launch, (kernels,), "_multinorm_kernel", lambda name: run(name, cases=CASES), assert_same_buckets)


@pytest.fixture(autouse=True)
def _fresh_caches():
    yield from FAMILY.fresh_caches()


@pytest.mark.parametrize("name", ["once", "table"])
def test_bits_do_not_depend_on_the_order(name, monkeypatch):
    FAMILY.check_orders(name, monkeypatch)


def test_every_wait_is_needed_and_there(monkeypatch):
    """Between any two of three phases of four parameters, and of two that wait for a slot of the scratch."""
    FAMILY.check_waits("once", monkeypatch, 4 * 2 + 2)


def test_a_wait_that_is_deleted_is_found(monkeypatch):
    FAMILY.check_deleted_waits("once", monkeypatch)


def test_phases_are_launches_of_the_same_kernel(monkeypatch):
    FAMILY.check_launches("once", monkeypatch, 3 * len(CASES))


def requested(monkeypatch, shape, rule, precision=BF16):
    """One step's traffic of a tensor, by name; the scratch and the tables have names of their own."""
    bucket = make_bucket([Case("case", shape)], precision)
    scratch = torch.full((1 << 20,), torch.nan)
    monkeypatch.setattr(torch, "empty", lambda size, **_: scratch[:size])
    with count_bytes({**dict(zip(NAMES, bucket.columns(), strict=True)), "scratch": scratch}) as traffic:
        bucket.run(rule, backend="triton")
    return traffic


TABLE = NormRule(("row", "col") * 5 + ("row",), row_threshold=1e-3, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    ("formula", "rule", "shape"),
    [
        ("sinkgd", NormRule(), (8, 4096)),
        ("sinkgd", NormRule(), (260, 64)),
        ("sinkgd_once", NormRule(("row", "col")), (2, 11008)),
        ("one_sided", NormRule(), (60, 120)),  # held as a whole, and read once
        ("sinkgd_once", NormRule(("row", "col")), (24, 4096)),
        ("one_sided", NormRule(("row",)), (24, 4096)),
        ("one_sided", NormRule(("col",)), (128, 512)),
        ("one_sided", NormRule(("sign",)), (24, 4096)),
        ("table", TABLE, (24, 1024)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bytes(formula, rule, shape, monkeypatch):
    """L + 1 reads of g, p once, no copy of either: 16 bytes for each bfloat16 element of SinkGD with 5 iterations."""
    n, m = shape
    traffic = requested(monkeypatch, shape, rule)
    s = 4 if rule.momentum else 0
    assert tuple(
        sum(kind[name] for name in ("params", "grads", "exp_avgs")) for kind in (traffic.read, traffic.written)
    ) == bytes_moved(formula, n * m, 2, s)
    assert traffic.read["params"] == traffic.written["params"] == 2 * n * m
    assert traffic.written["grads"] == 0
    if formula == "sinkgd":
        # five reads, the last one, and p: no matrix here is held as a whole
        assert sum(bytes_moved(formula, n * m, 2)) == 16 * n * m


def test_bytes_of_sums_and_scales(monkeypatch):
    """Sums over a group's lines are written and read once in each iteration, scales of places by each group."""
    n, m = 40, 1024
    groups = min(-(-n // 8), MAX_GROUPS)
    traffic = requested(monkeypatch, (n, m), NormRule())
    sums, few = 5 * groups * m, 4 * (groups + m // SLAB) * 5 * 8
    written = 4 * (sums + 5 * m + 5 * n)
    assert written <= traffic.written["scratch"] <= written + few
    # in each read from the second one on
    read = 4 * (sums + 5 * groups * m)
    assert read <= traffic.read["scratch"] <= read + few + 4 * 6 * n
