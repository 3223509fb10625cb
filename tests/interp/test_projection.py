"""The projection kernels in Triton's interpreter against the reference, over all shapes, rules and dtypes."""

import pytest
import torch

import parity
from buckets import FP32, SEED
from lowmem_kernels import GradTransform
from lowmem_kernels.projection import Draw, channel_apply_, launch, project, projection_matrix, schedule
from lowmem_kernels.projection.banks import _shared_bank
from lowmem_kernels.projection.rule import sides_of
from lowmem_kernels.projection.schedule import Work, route_of
from lowmem_kernels.schedules import Shape, geometries_of
from lowmem_kernels.table import strides_of
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision
from projection_buckets import HYPER, NAMES, RULES, make_bucket

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.float32)
#: One of each layout that is cheap to interpret; the rest with two rules only.
FEW = [
    *(case for case in SHAPES if case.name in ("row", "odd_matrix", "transposed", "columns_of_wider", "misaligned")),
    Case("wide", (20, 264)),
    Case("wide_transposed", (24, 136), "transposed", "transposed"),
    Case("stack", (3, 40, 24)),
]
#: Roots are approximate, as on a GPU, and sums in another order: scales are off by some units.
SLACK = 8


def check(rule, cases, precision=FP32, **options):
    actual, expected = (make_bucket(cases, rule, precision) for _ in range(2))
    start = expected.copies()
    actual.run(rule, backend="triton", **options)
    expected.run(rule, backend="torch", **options)
    for name, column, other, old in zip(NAMES, actual.columns(), expected.columns(), start, strict=True):
        for case, *tensors in zip(cases, column, other, old, strict=True):
            parity.assert_close(*tensors, 1, f"{name} of {case}", slack=SLACK)


def test_every_shape():
    check(RULES["rank_4"], SHAPES)


def test_every_shape_at_rank_1():
    """Those of which something is projected."""
    check(RULES["mini"], [case for case in SHAPES if len(case.shape) > 1 and min(case.shape[-2:]) > 1])


@pytest.mark.parametrize(("name", "source"), [
    ("one_channel_each", "gaussian"), ("one_channel_each", "torch"), ("rank_20_left", "rademacher"),
    ("rank_24", "torch"), ("convolution", "gaussian"), ("full", "gaussian"),
])  # fmt: skip
def test_every_rule(name, source):
    check(RULES[name], FEW, source=source)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["mini", "rank_24"])
def test_every_dtype(name, precision):
    """Of stochastic rounding, the noise of each element too, of parameters and moments in either order."""
    check(RULES[name], FEW[1:], precision)


@pytest.mark.parametrize("transform", [
    dict(inv_scale=torch.tensor(1 / 1024), maximize=True), dict(clip_value=1e-3, clip_coef=torch.tensor(0.37)),
], ids=["scaled", "clipped"])  # fmt: skip
def test_the_gradient_is_transformed(transform):
    for name in ("mini", "rank_4", "full"):
        check(RULES[name], FEW[1:4], transform=GradTransform(**transform))


def test_routes():
    """The cases above take every route: each mode, channels that lie in one piece or not, rows and columns."""
    bucket = make_bucket([*SHAPES, *FEW], RULES["rank_4"], BF16_SR)
    found = set()
    for geometry in geometries_of(bucket.params, strides_of(bucket.params, bucket.grads)):
        for rank in (1, 4, 1000):
            route = route_of(geometry, True, Work((0, 1, 2), rank, "std", False, True))
            kind = "aligned" if route.layout.aligned else "strided" if route.layout.strided else "ragged"
            found.add((route.mode, kind, route.right, route.contiguous))
    sides = [
        (mode, right, contiguous) for mode in ("one", "dot") for right in (True, False) for contiguous in (True, False)
    ]
    assert found >= {
        (mode, "aligned", right, contiguous) for mode, right, contiguous in sides if right or not contiguous
    }
    assert {("one", "strided", False, False), ("dot", "ragged", True, True), ("none", "ragged", False, False)} <= found


@pytest.mark.parametrize(("limit", "value"), [
    ("MAX_RANKS", 16), ("MOMENT_TICKET", 64), ("DOT_TILE", Shape(16, 32)), ("TILE", Shape(8, 32)),
])  # fmt: skip
def test_other_cuts(limit, value, monkeypatch):
    """Ranks in several reads, tickets of few channels, channels in several tiles."""
    launch._schedules_of.cache_clear()
    monkeypatch.setattr(schedule, limit, value)
    check(RULES["mini" if limit == "TILE" else "rank_24"], FEW[5:], BF16)
    launch._schedules_of.cache_clear()


@pytest.mark.parametrize(("rank", "source"), [(1, "gaussian"), (5, "gaussian"), (9, "rademacher")])
def test_projections_have_the_same_bits(rank, source):
    """Those of the torch reference: arithmetic of one order, rounded to nearest."""
    for shape in ((1100, 1029), (3, 7)):
        draw = Draw(source, SEED, [2**50 + 1], 11)
        made = (projection_matrix(shape, rank=rank, draw=draw, backend=backend) for backend in ("triton", "torch"))
        assert torch.equal(*made)


@pytest.mark.parametrize("name", ["mini", "rank_4", "rank_20_left", "full"])
def test_project(name):
    """What the kernel draws as it goes at rank 1 is what `projection_matrix` says too."""
    rule, grads = RULES[name], make_bucket(FEW, RULES[name]).grads
    draw = Draw("gaussian", SEED, range(len(grads)), 5)
    made = [
        project(grads, rank=rule.rank, proj_type=rule.proj_type, draw=draw, backend=backend)
        for backend in ("triton", "torch")
    ]
    for actual, expected in zip(*made, strict=True):
        for case, x, y in zip(FEW, actual, expected, strict=True):
            scale = y.abs().max().item()
            torch.testing.assert_close(
                x, y, rtol=1e-6, atol=2e-6 * scale, msg=lambda text, case=case: f"{case}: {text}"
            )


def test_channel_apply():
    rule = RULES["rank_4"]
    actual, expected = make_bucket(FEW, rule, BF16_SR), make_bucket(FEW, rule, BF16_SR)
    start, counts = expected.copies(), []
    scales = [torch.rand(*c.shape[:-2], sides_of(c.shape, 1, "std", False).channels) for c in FEW]
    for bucket, backend in ((actual, "triton"), (expected, "torch")):
        bucket.grads[1][3, 5] = torch.nan
        counts.append(torch.tensor(7))
        channel_apply_(
            bucket.params, bucket.grads, scales, bucket.steps, **HYPER, transform=GradTransform(skipped=counts[-1]),
            backend=backend,
        )  # fmt: skip
    assert counts == [8, 8]
    for case, *tensors in zip(FEW, actual.params, expected.params, start[0], strict=True):
        parity.assert_close(*tensors, 1, str(case))


@pytest.mark.parametrize("name", ["mini", "rank_4", "full"])
def test_a_bad_element(name):
    """Its parameter, state and step stay as they are, and it is counted as one; the others move."""
    bucket = make_bucket(FEW, RULES[name])
    bucket.grads[1][3, 5], bucket.grads[5][1, 2] = torch.nan, -torch.inf
    before, count = bucket.copies(), torch.tensor(7)
    bucket.run(RULES[name], transform=GradTransform(skipped=count), backend="triton")
    assert count == 9
    for i in range(len(FEW)):
        same = [torch.equal(column[i], old[i]) for column, old in zip(bucket.columns()[2:], before[2:], strict=True)]
        assert torch.equal(bucket.params[i], before[0][i]) is (i in (1, 5))
        assert all(same) if i in (1, 5) else not any(same)


def test_an_epoch_on_the_device():
    """Projections are drawn again exactly where it has changed, whoever changed it in between."""
    epoch, rule = torch.tensor(1), RULES["rank_4"]
    values = []
    for now in (1, 1, 2, 1):
        epoch.fill_(now)
        bucket = make_bucket(FEW[:2], rule)
        bucket.run(rule, epoch=epoch, backend="triton")
        assert bucket.epochs == [now, now]
        values.append(bucket.params[1].clone())
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[3])
    assert not torch.equal(values[0], values[2])
    bank = _shared_bank(29, 4, "gaussian", SEED, torch.device("cpu"), 0, None)
    bank.values.fill_(0)
    bank.draw(epoch)
    assert not bank.values.any()  # not drawn again
    bank.draw(2)
    assert bank.values.all()
