"""The whitening kernels in Triton's interpreter: against the float64 oracle, and against the torch reference.

Two fp32 results lie on different sides of the exact one, so all comparisons are with the bound that the oracle gives
for the matrix (whitening_oracles.py).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from buckets import FP32, NAMES, Bucket, assert_same_buckets, fenced, make_bucket
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.tensors import Tensors
from lowmem_kernels.testing import DTYPES, PRECISIONS, Case, assert_same_bits, make_tensors
from lowmem_kernels.whitening import WhiteningRule, launch, schedule, solver, whiten_, whitened
from whitening_buckets import BF16_SR, CASES, HYPER, RULES, exact_d, numpy64, step_and_check

SWAN = WhiteningRule()
#: One of each layout, few elements: a program takes the interpreter ten milliseconds.
FEW = [
    Case("empty", (0, 3)),
    Case("row", (1, 43)),
    Case("column", (19, 1)),
    Case("odd", (13, 11)),
    Case("experts_transposed", (2, 11, 23), "transposed", "transposed"),
    Case("misaligned", (11, 19), "misaligned", "misaligned"),
]
#: Gram matrices of several tiles on either side, aligned and not, with tiles that are not full.
TILED = [
    Case("wide_tiles", (136, 200)),
    Case("tall_tiles", (200, 136)),
    Case("tall_ragged", (149, 131)),
    Case("wide_transposed", (131, 149), "transposed", "transposed"),
    Case("square_misaligned", (72, 72), "misaligned", "contiguous"),
]
#: One of each side, aligned, with a few columns more than a tile.
SIDES = [Case("wide_plus", (16, 72)), Case("tall_plus", (72, 16))]


@pytest.fixture(autouse=True)
def deep_tiles(monkeypatch):
    """Tiles of depth 64 instead of 16, which takes the interpreter a third of the time. `test_every_dtype` does not."""
    planned = launch.plan_products
    monkeypatch.setattr(launch, "plan_products", lambda *given: replace(planned(*given), block_k=64))
    return planned


def run(bucket, backend="triton", rule=SWAN, **options):
    options = {**HYPER, "rounding": bucket.rounding(), **options}
    whiten_(bucket.params, bucket.grads, bucket.steps, rule=rule, backend=backend, **options)


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("case", [*CASES, *TILED], ids=str)
def test_every_shape(case, precision):
    rule = RULES["conv" if len(case.shape) == 4 else "swan"]  # else 30 matrices of 3 x 3
    step_and_check(make_bucket([case], precision), rule, backend="triton")


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p.state is torch.float32 or p.stochastic], ids=str)
def test_every_dtype(precision, monkeypatch, deep_tiles):
    monkeypatch.setattr(launch, "plan_products", deep_tiles)
    step_and_check(make_bucket(SIDES, precision), RULES["swan"], backend="triton")


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("name", [name for name in RULES if name != "swan"])
def test_every_rule(name, precision):
    """Layouts mixed in one call; folded convolutions of all layouts."""
    wanted = ("empty", "row", "odd_matrix", "experts", "transposed_param", "misaligned_block_plus_1", "expanded_grad",
              "conv_channels_last", "conv_grad_channels_last", "reversed_dims")  # fmt: skip
    cases = [c for c in CASES if c.name in wanted and (RULES[name].get("conv") or len(c.shape) < 4)]
    step_and_check(make_bucket(cases, precision), RULES[name], backend="triton")


@pytest.mark.parametrize("block", [64, 128])
def test_large_tiles(block, monkeypatch):
    """Tiles of 128 are those of large matrices, of which the interpreter would take minutes."""
    monkeypatch.setattr(schedule, "block_of", lambda size, layout: block)
    launch._schedules_of.cache_clear()
    step_and_check(make_bucket(TILED[:2], BF16_SR), RULES["swan"], backend="triton")
    launch._schedules_of.cache_clear()


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
def test_equals_the_reference(precision):
    """Over two steps: fp32 within twice the oracle's bound for each; bfloat16 with the same noise, so that at most
    1 in 100 elements differ, by a distance of two neighbours for each step."""
    cases = [*FEW, *SIDES]
    start, *buckets = [make_bucket(cases, precision) for _ in range(3)]
    for bucket, backend in zip(buckets, ("torch", "triton"), strict=True):
        for _ in range(2):
            run(bucket, backend)
    expected, actual = buckets
    for i, (a, e) in enumerate(zip(actual.params, expected.params, strict=True)):
        assert_same_bits(actual.steps[i], expected.steps[i])
        _, error = exact_d(actual.grads[i], {})
        size = np.maximum(np.abs(numpy64(e)), np.abs(numpy64(start.params[i])))
        allowed = 4 * HYPER["lr"] * HYPER["scale"] * error + 2 * 2.0**-22 * size
        if precision.param is torch.float32:
            assert (np.abs(numpy64(a) - numpy64(e)) <= allowed).all()
        else:
            assert (a != e).sum() <= 2 + a.numel() / 100
            assert (np.abs(numpy64(a) - numpy64(e)) <= 2 * 2.0**-7 * size + allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["swan", "multinorm", "muon", "conv"])
def test_whitened(name, dtype):
    """D itself, contiguous fp32 whatever the gradients are."""
    cases = [c for c in CASES if c.name in ("expanded_grad", "transposed_param")]
    grads = [make_tensors(case, dtype, 11 + i)[1] for i, case in enumerate([*FEW, *cases, *SIDES])]
    results = whitened(grads, rule=WhiteningRule(**RULES[name]), backend="triton")
    assert len(results) == len(grads)
    for grad, d in zip(grads, results, strict=True):
        assert d.dtype is torch.float32
        assert d.is_contiguous()
        assert d.shape == grad.shape
        expected, error = exact_d(grad, RULES[name])
        assert (np.abs(numpy64(d) - expected) <= error + 2.0**-22 * np.abs(expected)).all()


@pytest.mark.parametrize("name", ["swan", "multinorm", "muon"])
def test_rows_without_variance_do_not_move(name):
    """Their factor is 0 and not Inf; a constant row has no variance at all, whatever its mean rounds to."""
    for shape in ((40, 56), (56, 40)):
        grad = make_tensors(Case("matrix", shape), torch.float32, 3)[1]
        grad[::4] = 0.0
        if name == "swan":
            grad[1::4] = 0.3
        (d,) = whitened([grad], rule=WhiteningRule(**RULES[name]), backend="triton")
        still = torch.arange(shape[0]) % 4 < (2 if name == "swan" else 1)
        assert (d[still] == 0).all()
        assert d.isfinite().all()
        assert (d[~still] != 0).any(1).all()


TRANSFORMS = {
    "inv_scale": dict(inv_scale=2.0**-16),
    "clip_value": dict(clip_value=2.0**-10),
    "all": dict(inv_scale=2.0**-3, clip_value=2.0**-13, clip_coef=0.5, maximize=True),
}


@pytest.mark.parametrize("gradient", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradient_transforms(gradient):
    transform = GradTransform(
        **{k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in gradient.items()}
    )
    for normalize in ("gradnorm", None):
        step_and_check(make_bucket(FEW), dict(normalize=normalize, beta=0.5), transform, gradient, backend="triton")


@pytest.mark.parametrize(
    "options", [dict(lr=torch.tensor(2.0**-9)), dict(lr=1), dict(scale=3), dict(scale=0.0, weight_decay=0)], ids=str
)
def test_hyperparameters(options):
    step_and_check(make_bucket(FEW), dict(beta=0.5), backend="triton", **options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("clip_value", [None, 1.0])
def test_a_parameter_that_is_not_finite_keeps_everything(bad, clip_value):
    cases = [*FEW, Case("experts", (3, 24, 16))]
    bucket = make_bucket(cases)
    bucket.grads[-1][1, 2, 3] = bad
    before, skipped = bucket.copies(), torch.tensor(4)
    run(bucket, transform=GradTransform(skipped=skipped, clip_value=clip_value))
    kept = bad != 3e38 or clip_value is None
    assert skipped.item() == 4 + kept
    for i, (p, old) in enumerate(zip(bucket.params, before[0], strict=True)):
        moved = i < len(cases) - 1 or not kept
        assert bucket.steps[i].item() == before[4][i].item() + moved
        assert p.isfinite().all()
        assert bool((p != old).any()) == (moved and p.numel() > 0)


@pytest.mark.parametrize("bad", [torch.inf, 3e38])
@pytest.mark.parametrize("normalize", ["gradnorm", "row", None])
def test_what_is_not_finite_goes_through_when_asked(normalize, bad):
    bucket = make_bucket([FEW[1], Case("experts", (3, 24, 16))])
    bucket.grads[-1][1, 2, 3] = bad
    transform = GradTransform(skip_nonfinite=False, skipped=torch.tensor(0))
    run(bucket, transform=transform, rule=WhiteningRule(normalize=normalize))
    assert bucket.params[-1][1].isnan().all()
    assert all(p.isfinite().all() for p in (bucket.params[0], bucket.params[-1][0], bucket.params[-1][2]))
    assert transform.skipped.item() == 0
    (d,) = whitened(bucket.grads[-1:], rule=WhiteningRule(normalize=normalize), backend="triton")
    assert d[1].isnan().all()
    assert d[[0, 2]].isfinite().all()


def test_found_inf_leaves_everything():
    bucket, skipped = make_bucket(FEW), torch.tensor(3)
    bucket.grads[-1].fill_(torch.nan)
    before = bucket.copies()
    with np.errstate(invalid="ignore"):
        run(bucket, transform=GradTransform(found_inf=torch.tensor(1.0), skipped=skipped))
    for column, old in zip((bucket.params, bucket.steps), (before[0], before[4]), strict=True):
        for tensor, other in zip(column, old, strict=True):
            assert_same_bits(tensor, other)
    assert skipped.item() == 3
    bucket.grads[-1].fill_(0.5)
    run(bucket, transform=GradTransform(found_inf=torch.tensor(0.0)))
    assert all(s.item() == t.item() + 1 for s, t in zip(bucket.steps, before[4], strict=True))


def test_two_runs_have_the_same_bits():
    """With lists that are remembered, too, whose tables are uploaded once."""
    one, two, three = (make_bucket([*FEW, *SIDES], BF16_SR) for _ in range(3))
    run(one)
    run(two)
    three.params, three.steps = Tensors(three.params), Tensors(three.steps)
    run(three)
    assert_same_buckets(two, one)
    assert_same_buckets(three, one)
    for bucket in (one, three):
        bucket.grads = [0.5 * g for g in bucket.grads]  # at other addresses
        run(bucket)
    assert_same_buckets(three, one)


def test_neighbours_do_not_matter():
    """Bits of the kernels do not depend on what else is in the lists, and errors stay in the bound where equal problems
    are solved in one batch, whose products a library may add up in another order."""
    cases = [*FEW, *SIDES, TILED[-1]]
    together = make_bucket(cases, BF16_SR)
    run(together)
    sizes = [min(c.shape[-2:]) for c in cases]
    for i, case in enumerate(cases):
        whole = make_bucket(cases, BF16_SR)
        alone = Bucket(*([column[i]] for column in whole.columns()), BF16_SR)
        run(alone, rounding=Rounding(True, whole.rounding().seed, [whole.rounding().uids[i]]))
        if sizes.count(sizes[i]) == 1:
            for name, a, b in zip(NAMES, alone.columns(), together.columns(), strict=True):
                assert_same_bits(a[0], b[i], f"{name} of {case}")


def test_small_workspace_changes_no_more_than_the_batch(monkeypatch):
    """One problem at a time, and matrices of a stack in several groups."""
    monkeypatch.setattr(schedule, "WORKSPACE_BYTES", 2 * 20 * 24 * 24)
    launch._schedules_of.cache_clear()
    cases = [Case("experts", (5, 24, 48)), Case("more", (24, 40)), Case("tall", (40, 24))]
    (found,) = schedule.schedules_of([schedule.Geometry(c.shape, None) for c in cases], [True] * 3, range(3), False)
    assert [group.count for group in found.groups] == [2, 2, 2, 1]
    step_and_check(make_bucket(cases, BF16_SR), RULES["swan"], backend="triton")
    launch._schedules_of.cache_clear()


@pytest.mark.parametrize(("precision", "poison"), [(FP32, -1), (BF16_SR, 0x4242)], ids=["fp32_nan", "bf16_numbers"])
def test_nothing_outside_the_tensors_matters_or_changes(precision, poison):
    """Between 4 KB of garbage on both sides, and garbage between strided elements: same bits, no stores there."""
    wanted = ("odd_matrix", "columns_of_wider", "transposed_param")
    cases = [*[c for c in CASES if c.name in wanted], *FEW, SIDES[0]]
    plain, fenced_in = (make_bucket(cases, precision) for _ in range(2))
    fences = []
    for column in (fenced_in.params, fenced_in.grads):
        for i, tensor in enumerate(column):
            column[i], storage, outside = fenced(tensor, poison)
            fences.append((storage, outside, storage[outside].clone()))
    run(plain)
    run(fenced_in)
    assert_same_buckets(fenced_in, plain)
    for storage, outside, garbage in fences:
        assert_same_bits(storage[outside], garbage)


def test_autograd_sees_that_parameters_were_written():
    bucket = make_bucket(FEW)
    versions = [p._version for p in bucket.params]
    run(bucket)
    assert [p._version for p in bucket.params] == [version + 1 for version in versions]


def test_no_matrix_of_the_gradients_size_is_made(monkeypatch):
    """What torch allocates for a wide and a tall matrix is a few Gram matrices and two numbers for each row."""
    sizes = []
    allocate = torch.empty
    for module in (launch, solver):
        monkeypatch.setattr(
            module.torch, "empty", lambda *a, **k: (sizes.append(allocate(*a, **k).numel()), allocate(*a, **k))[1]
        )
    bucket = make_bucket([Case("wide", (16, 1000)), Case("tall", (1000, 16))])
    run(bucket)
    assert max(sizes) <= 2 * 1016
