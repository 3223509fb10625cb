"""The multi-normalization kernel in Triton's interpreter against the reference, over all shapes, rules and dtypes."""

import pytest
import torch

import parity
from buckets import FP32
from lowmem_kernels import GradTransform, lines
from lowmem_kernels.multinorm import NormRule, rank1_apply_, schedule, sinkhorn_scales
from lowmem_kernels.multinorm.schedule import route_of
from lowmem_kernels.schedules import geometries_of
from lowmem_kernels.table import strides_of
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision
from multinorm_buckets import HYPER, NAMES, RULES, make_bucket

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: One of each layout that is cheap to interpret; the rest with one rule only.
FEW = [
    *(
        case
        for case in SHAPES
        if case.name in ("row", "odd_matrix", "experts_transposed", "transposed", "columns_of_wider")
    ),
    Case("wide", (20, 264)),
    Case("narrow_stack", (3, 130, 24)),
]
ROUTES = [*SHAPES, Case("short_columns", (2, 16400)), Case("long_rows", (3, 2100))]
#: The kernel's roots are approximate, as on a GPU, so that scales are off by two units more at each half-step.
SLACK = 4


def check(rule, cases, precision=FP32, **options):
    actual, expected = make_bucket(cases, precision), make_bucket(cases, precision)
    start = expected.copies()
    actual.run(rule, backend="triton", **options)
    expected.run(rule, backend="torch", **options)
    for name, column, other, old in zip(NAMES, actual.columns(), expected.columns(), start, strict=True):
        for case, *tensors in zip(cases, column, other, old, strict=True):
            parity.assert_close(*tensors, 1, f"{name} of {case}", slack=SLACK)


def test_every_shape():
    check(RULES["once"], ROUTES)


@pytest.mark.parametrize("name", RULES)
def test_every_rule(name):
    check(RULES[name], FEW)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["once", "momentum_after"])
def test_every_dtype(name, precision):
    """Of stochastic rounding, the noise of each element too, in every order of lines."""
    check(RULES[name], FEW, precision)


@pytest.mark.parametrize(
    "transform",
    [
        dict(inv_scale=torch.tensor(1 / 1024), maximize=True),
        dict(clip_value=1e-3, clip_coef=torch.tensor(0.37)),
    ],
    ids=["scaled", "clipped"],
)
def test_the_gradient_is_transformed(transform):
    check(RULES["momentum_before"], FEW[:5], transform=GradTransform(**transform))
    check(RULES["clamped"], FEW[:5], transform=GradTransform(**transform))


def test_routes():
    """The cases above take every route: rows and columns as lines, in one piece or not, held or read twice."""
    bucket = make_bucket([*ROUTES, *FEW], BF16_SR)
    found = set()
    for geometry in geometries_of(bucket.params, strides_of(bucket.params, bucket.grads)):
        for aligned in (True, False):
            route = route_of(geometry, aligned, RULES["once"])
            kind = "aligned" if route.layout.aligned else "strided" if route.layout.strided else "ragged"
            lines = "rows" if route.rows else "columns"
            found.add((kind, lines, route.contiguous, route.resident, route.whole))
    assert found >= {
        ("aligned", "rows", True, True, False), ("aligned", "columns", False, True, False),
        ("ragged", "rows", True, True, False), ("ragged", "rows", True, False, False),
        ("ragged", "columns", True, True, False), ("strided", "rows", True, True, False),
        ("aligned", "rows", True, True, True), ("aligned", "columns", True, True, True),
        ("ragged", "rows", True, True, True), ("strided", "rows", True, True, True),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["once", "column_first", "row", "row_then_all", "sign_then_all"])
def test_scales(name):
    """Their products: which of the two has a common factor is not said."""
    grads = make_bucket(FEW).grads
    actual, expected = (sinkhorn_scales(grads, rule=RULES[name], backend=backend) for backend in ("triton", "torch"))
    for case, s, t, other_s, other_t in zip(FEW, *actual, *expected, strict=True):
        x, y = (r.unsqueeze(-1) * c.unsqueeze(-2) for r, c in ((s, t), (other_s, other_t)))
        torch.testing.assert_close(x, y, rtol=4e-6, atol=0, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
def test_rank1_apply(sign, offsets):
    actual, expected = make_bucket(FEW), make_bucket(FEW)
    start = expected.copies()
    s, t = sinkhorn_scales(actual.grads, rule=NormRule(("row",)), backend="torch")
    a, b = ([torch.randn_like(v) for v in side] if offsets else None for side in (s, t))
    for bucket, backend in ((actual, "triton"), (expected, "torch")):
        rank1_apply_(
            bucket.params, bucket.grads, s, t, bucket.steps, row_offsets=a, col_offsets=b, sign=sign, backend=backend,
            **HYPER,
        )  # fmt: skip
    for case, *tensors in zip(FEW, actual.params, expected.params, start[0], strict=True):
        parity.assert_close(*tensors, 1, str(case))


@pytest.mark.parametrize("name", ["once", "row", "col", "sign", "frobenius", "table"])
def test_a_bad_element(name):
    """The same is kept and counted, and steps are the same."""
    cases = FEW[1:6]
    actual, expected = make_bucket(cases), make_bucket(cases)
    start = expected.copies()
    counts = []
    for bucket, backend in ((actual, "triton"), (expected, "torch")):
        bucket.grads[0][3, 5] = torch.nan
        bucket.grads[4][1, 2] = torch.inf
        counts.append(torch.tensor(7))
        bucket.run(RULES[name], transform=GradTransform(skipped=counts[-1]), backend=backend)
    assert counts[0] == counts[1] > 7
    for case, *tensors in zip(cases, actual.params, expected.params, start[0], strict=True):
        parity.assert_close(*tensors, 1, str(case), slack=SLACK)
    assert actual.steps == expected.steps


@pytest.mark.usefixtures("_schedules_made_anew")
@pytest.mark.parametrize(("limit", "value"), [("MAX_GROUPS", 2), ("LONGEST", 64), ("SMALL_TILES", 3)])
def test_larger_groups_and_longer_lines(limit, value, monkeypatch):
    """Groups of several blocks, lines that are read twice, matrices that share a ticket."""
    monkeypatch.setattr(lines if limit == "SMALL_TILES" else schedule, limit, value)
    cases = [Case("wide", (40, 520)), Case("stack", (2, 24, 136)), Case("ragged", (70, 67)), Case("small", (7, 3, 8))]
    for name in ("once", "table", "row"):
        check(RULES[name], cases)


@pytest.fixture
def _schedules_made_anew():
    """For tests that change how work is cut."""
    from lowmem_kernels.multinorm import launch

    launch._schedules_of.cache_clear()
    yield
    launch._schedules_of.cache_clear()
