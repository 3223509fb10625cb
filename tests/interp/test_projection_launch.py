"""Bits that depend on nothing else, memory outside the tensors, launches, waits and races between programs, bytes."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from buckets import FP32, counters_at_zero, fenced
from lowmem_kernels import schedules
from lowmem_kernels.projection import ApolloRule, kernels, launch
from lowmem_kernels.testing import SHAPES, Case, Precision, assert_same_bits, bytes_moved
from lowmem_kernels.testing.bytecount import count_bytes
from projection_buckets import NAMES, RULES, assert_same_buckets, make_bucket
from races import no_races
from ticket_contract import Family

BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.float32)
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: One of each layout; several groups and matrices.
VARIED = [
    *(case for case in SHAPES if case.name in ("empty", "seven", "odd_matrix", "transposed", "columns_of_wider")),
    Case("wide_stack", (2, 34, 136)),
]
#: By sums, by products, and neither.
MODES = ["mini", "rank_4", "full"]
#: One route, so one launch; a bundle each, so that slots of the scratch are reused.
CASES = [Case("matrix", (24, 200)), Case("small", (16, 80)), Case("stack", (2, 8, 136)), Case("last", (2, 24, 72))]


def run(name, precision=BF16_SR, cases=VARIED, **options):
    bucket = make_bucket(cases, RULES[name], precision)
    bucket.run(RULES[name], backend="triton", **options)
    return bucket


@pytest.mark.parametrize("name", MODES)
def test_bits_do_not_depend_on_neighbours_or_the_run(name, monkeypatch):
    with counters_at_zero(monkeypatch, schedules):
        together, others = run(name), make_bucket(VARIED, RULES[name], BF16_SR)
        for i in range(len(VARIED)):
            alone = others.only([i])
            alone.run(RULES[name], backend="triton", uids=together.uids([i]))
            assert_same_buckets(alone, together.only([i]))


@pytest.mark.parametrize("name", MODES)
def test_programs_share_memory_in_order_only(name):
    with no_races():
        run(name)


@pytest.mark.parametrize(("precision", "poison"), [(FP32, -1), (BF16_SR, 0x4242)], ids=["fp32_nan", "bf16_numbers"])
@pytest.mark.parametrize("name", ["mini", "rank_4"])
def test_nothing_outside_the_tensors_matters_or_changes(name, precision, poison):
    """Between 4 KB of garbage on both sides, and garbage between strided elements: same bits, no stores there."""
    plain, fenced_in = (make_bucket(VARIED, RULES[name], precision) for _ in range(2))
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
    Case("square", (16, 16)),
    Case("wide", (65, 136)),
    Case("transposed", (24, 16), "transposed", "transposed"),
    Case("strided", (24, 16), "transposed", "contiguous"),
]


@pytest.mark.parametrize("name", ["mini", "rank_4"])
def test_launches_do_not_grow_with_parameters(name, monkeypatch):
    """One for each route, and one for each projection that parameters share. Kernels are counted, not run."""
    launches = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: launches.append(self.__name__))
    for layouts in (LAYOUTS[:1], LAYOUTS):
        contracted = {min(case.shape) for case in layouts} if name == "rank_4" else set()
        for count in (6, 60, 291):
            launches.clear()
            run(name, cases=(layouts * count)[:count], epoch=torch.tensor(3))
            assert launches == ["_projection_kernel"] * len(contracted) + ["_apollo_kernel"] * len(layouts)
    # of an epoch that the host knows, none that has been drawn
    launches.clear()
    for _ in range(2):
        run(name, cases=LAYOUTS[:1], epoch=4)
    assert launches.count("_projection_kernel") == (name == "rank_4")


def test_autograd_knows_that_parameters_changed():
    bucket = make_bucket(VARIED, RULES["mini"])
    versions = [param._version for param in bucket.params]
    bucket.run(RULES["mini"], backend="triton")
    assert all(param._version > old for param, old in zip(bucket.params, versions, strict=True))


FAMILY = Family(launch, (kernels,), "_apollo_kernel", lambda name: run(name, cases=CASES), assert_same_buckets)


@pytest.fixture(autouse=True)
def _fresh_caches():
    yield from FAMILY.fresh_caches()


@pytest.mark.parametrize("name", ["mini", "rank_4"])
def test_bits_do_not_depend_on_the_order(name, monkeypatch):
    FAMILY.check_orders(name, monkeypatch)


def test_every_wait_is_needed_and_there(monkeypatch):
    """Between any two of three phases of four parameters, and of two that wait for a slot of the scratch."""
    FAMILY.check_waits("mini", monkeypatch, 4 * 2 + 2)


def test_a_wait_that_is_deleted_is_found(monkeypatch):
    FAMILY.check_deleted_waits("mini", monkeypatch)


def test_phases_are_launches_of_the_same_kernel(monkeypatch):
    FAMILY.check_launches("mini", monkeypatch, 3 * len(CASES))


@pytest.mark.parametrize(("rank", "shape"), [(1, (40, 264)), (1, (300, 64)), (16, (136, 64)), (16, (64, 136))])
def test_bytes(rank, shape, monkeypatch):
    """Two reads of g and p once: 8 bytes for each bfloat16 element. Moments once, and R written and read once."""
    rule = ApolloRule(rank)
    bucket = make_bucket([Case("case", shape)], rule, BF16)
    scratch = torch.full((1 << 20,), torch.nan)
    monkeypatch.setattr(torch, "empty", lambda *size, **_: scratch[: size[0]] if len(size) == 1 else torch.zeros(size))
    with count_bytes({**dict(zip(NAMES, bucket.columns(), strict=True)), "scratch": scratch}) as traffic:
        bucket.run(rule, backend="triton")
    numel, channels = shape[0] * shape[1], max(shape)
    requested = [kind["params"] + kind["grads"] for kind in (traffic.read, traffic.written)]
    assert tuple(requested) == bytes_moved("apollo", numel, 2)
    assert sum(requested) == 8 * numel
    assert traffic.read["grads"] == 2 * 2 * numel
    for name in ("exp_avgs", "exp_avg_sqs"):
        assert traffic.read[name] == traffic.written[name] == 4 * rank * channels
    # sums of squares, scales, and a few numbers for each ticket
    for kind in (traffic.read, traffic.written):
        assert 4 * (rank + 2) * channels <= kind["scratch"] <= 4 * (rank + 2) * channels + 2500
