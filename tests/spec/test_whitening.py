"""The whitening reference against float64 NumPy: D itself, and parameters that are the exact result rounded once.

How far D may be off depends on the matrix: the oracle says what a backward error of fp32 does to it. Where singular
values are alike that is 5e-6, and with beta = 0.8 up to 2e-2 where they span decades: the map of an eigenvalue has
slope -1.8 at its fixed point, so errors do not die out.
"""

import numpy as np
import pytest
import torch

from buckets import FP32, make_bucket
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import PRECISIONS, Case, assert_same_bits, make_tensors
from lowmem_kernels.testing.oracles import whitening as exact
from lowmem_kernels.whitening import WhiteningRule, reference, whiten_, whitened
from whitening_buckets import BF16_SR, CASES, HYPER, RULES, numpy64, step_and_check

#: There is no state, and one rule is enough for what all share: reading, rounding.
PRECISE = [
    (name, p)
    for name in RULES
    for p in PRECISIONS
    if p in (FP32, BF16_SR) or (name == "swan" and (p.state is torch.float32 or p.stochastic))
]


@pytest.mark.parametrize(("name", "precision"), PRECISE, ids=str)
def test_every_shape_and_dtype(name, precision):
    step_and_check(make_bucket(CASES, precision), RULES[name])


def constant_rows(grad):
    grad[..., ::3, :] = 0.3  # no number of fp32, so that its mean over n elements is not what it was
    return grad


def zero_rows_and_columns(grad):
    grad[..., ::3, :] = 0
    grad[..., 1::4] = 0
    return grad


def low_rank(grad):
    noise = 0.05 * grad
    return grad[..., :3] @ (grad[..., :3, :] / 1e-3) + noise if min(grad.shape[-2:]) >= 3 else grad


#: make_tensors' gradients are about 1e-3.
PATTERNS = {
    "heavy": lambda grad: grad * (grad / 1e-3) ** 2,
    "tiny": lambda grad: grad * 1e-12,
    "large": lambda grad: grad * 1e12,
    "zero": torch.zeros_like,
    "constant": lambda grad: torch.full_like(grad, 0.3),
    "constant_rows": constant_rows,
    "dead": zero_rows_and_columns,
    "offset": lambda grad: grad + 0.1,
    "low_rank": low_rank,
    "rows_of_all_sizes": lambda grad: grad * torch.logspace(-9, 3, grad.shape[-2])[:, None],
}
FEW = [c for c in CASES if c.name in ("empty", "row", "column", "not_16", "odd_matrix", "experts")]
SQUARE = [Case("square", (48, 48)), Case("wide", (32, 180)), Case("tall", (180, 32))]


#: Without normalisation, only a few of the rows of all sizes are left, as of any matrix of rank 3.
HARD = [(name, each) for name in ("swan", "multinorm", "muon") for each in PATTERNS]
HARD.remove(("muon", "rows_of_all_sizes"))


@pytest.mark.parametrize(("name", "pattern"), HARD)
def test_gradients_that_are_hard(name, pattern):
    """With parameters of zero, where no rounding hides an error of D."""
    bucket = make_bucket([*FEW, *SQUARE])
    for param, grad in zip(bucket.params, bucket.grads, strict=True):
        param.zero_()
        if grad.numel():
            grad.copy_(PATTERNS[pattern](grad.clone()))
    # distances of 1e-3 from a mean of 0.1, where fp32 numbers are 7e-9 apart: an error of 1e-5 in X before anything
    # is computed, 1e-4 in the smallest singular values
    step_and_check(bucket, RULES[name])


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("normalize", ["gradnorm", "row"])
def test_rows_without_variance_do_not_move(normalize, conv):
    grad = make_tensors(Case("matrix", (40, 56)), torch.float32, 3)[1]
    grad[::4] = 0.0
    if normalize == "gradnorm":
        grad[1::4] = 0.3
    (d,) = whitened([grad], rule=WhiteningRule(normalize=normalize, conv=conv))
    still = torch.arange(40) % 4 < (2 if normalize == "gradnorm" else 1)
    assert (d[still] == 0).all()
    assert d.isfinite().all()
    assert (d[~still].abs().amax(1) > 0.1).all()


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (60, 300)])
@pytest.mark.parametrize("normalize", ["gradnorm", "row", None])
def test_half_converges_to_the_polar_factor(normalize, shape):
    """Ten steps take singular values above 0.3 of the largest to 1 within rounding errors, 1e-6 of D."""
    grad = torch.randn(shape)
    (d,) = whitened([grad], rule=WhiteningRule(normalize=normalize, beta=0.5))
    expected = exact.polar(numpy64(grad), normalize)
    assert np.linalg.norm(numpy64(d) - expected) <= 5e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(512, 128), (300, 290), (256, 64)])
def test_swan_on_the_smaller_side_of_tall_matrices(shape, monkeypatch):
    """Centred rows have the vector of ones as a null vector on the right. Ten steps with beta = 0.8 multiply what
    rounding errors leave there by 2.4**10 = 6000: errors of 3e-4 to 1e-3, of 1e-2 where the Gram matrix is less exact.
    With its eigenvalue out of the way they are 5e-6 and, of the nearly square matrix, 3e-5."""
    grad = torch.randn(shape)
    expected, _ = exact.whitened(numpy64(grad))

    def error():
        (d,) = whitened([grad], rule=WhiteningRule())
        return np.linalg.norm(numpy64(d) - expected) / np.linalg.norm(expected)

    lifted = error()
    solve = reference.inverse_root
    monkeypatch.setattr(reference, "inverse_root", lambda gram, rule, lift: solve(gram, rule, lift=False))
    assert lifted <= 2e-4
    assert error() >= 5 * lifted


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("empty", "expanded_grad")], ids=str)
@pytest.mark.parametrize("name", ["swan", "multinorm", "muon"])
def test_root_mean_square_is_one(name, case):
    """Of each matrix, by a factor known before the last product; that which is exactly zero has none."""
    grad = make_tensors(case, torch.float32, 5)[1]
    (d,) = whitened([grad], rule=WhiteningRule(**RULES[name]))
    for matrix, g in zip(exact.matrices(numpy64(d)), exact.matrices(numpy64(grad)), strict=True):
        rms = np.sqrt((matrix**2).mean())
        _, error = exact.whitened(g, **RULES[name])
        zero = case.name == "column" and name == "swan"
        assert rms == 0 if zero else abs(rms - 1) <= 4 * (error + 2.0**-19)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**-1, 2.0**40])
@pytest.mark.parametrize("name", ["swan", "multinorm", "muon"])
def test_the_scale_of_the_gradient_does_not_matter(name, factor):
    grads = [make_tensors(case, torch.float32, 7)[1] for case in FEW]
    rule = WhiteningRule(**RULES[name])
    scaled = whitened([factor * g for g in grads], rule=rule)
    for d, expected in zip(scaled, whitened(grads, rule=rule), strict=True):
        assert_same_bits(d, expected)


def test_large_tensors_are_cut_into_blocks(monkeypatch):
    """Blocks that end inside of the matrix give the same as the whole, tall and wide, with the noise of the whole."""
    cases = [Case("tall", (90, 40), "contiguous", "transposed"), Case("wide", (40, 90)), Case("conv", (12, 9, 3, 3))]
    for conv in (False, True):
        for block in (1, 400, 1700):
            monkeypatch.setattr(reference, "BLOCK", block)
            step_and_check(make_bucket(cases, BF16_SR), dict(beta=0.5, conv=conv))


TRANSFORMS = {
    "inv_scale": dict(inv_scale=2.0**-16),
    "clip_value": dict(clip_value=2.0**-10),
    "clip_coef": dict(clip_coef=0.3125),
    "maximize": dict(maximize=True),
    "all": dict(inv_scale=2.0**-3, clip_value=2.0**-13, clip_coef=0.5, maximize=True),
}


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("gradient", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradient_transforms(gradient, precision):
    transform = GradTransform(
        **{k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in gradient.items()}
    )
    for rule in (dict(beta=0.5), dict(normalize=None, beta=0.5)):
        step_and_check(make_bucket(FEW, precision), rule, transform, gradient)


@pytest.mark.parametrize(
    "options",
    [dict(lr=torch.tensor(2.0**-9)), dict(lr=0.0), dict(scale=3.0), dict(scale=0.0), dict(weight_decay=0.0)],
    ids=str,
)
def test_hyperparameters(options):
    """Decay goes with lr, not with lr scale."""
    step_and_check(make_bucket(FEW), dict(beta=0.5), **options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("clip_value", [None, 1.0])
def test_a_parameter_that_is_not_finite_keeps_everything(bad, clip_value):
    """Counted as one. Squares that overflow are not finite either, unless clipping bounds them."""
    bucket = make_bucket(FEW)
    for grad in bucket.grads:
        if grad.shape == (3, 11, 23):
            grad[1, 2, 3] = bad
    before, skipped = bucket.copies(), torch.tensor(4)
    transform = GradTransform(skipped=skipped, clip_value=clip_value)
    whiten_(bucket.params, bucket.grads, bucket.steps, rule=WhiteningRule(), transform=transform, **HYPER)
    kept = bad != 3e38 or clip_value is None
    assert skipped.item() == 4 + kept
    for case, p, old, step, t in zip(FEW, bucket.params, before[0], bucket.steps, before[4], strict=True):
        if case.name == "experts" and kept:
            assert_same_bits(p, old)
            assert step.item() == t.item()
        else:
            assert step.item() == t.item() + 1
            assert p.isfinite().all()
            assert case.name == "empty" or (p != old).any()


@pytest.mark.parametrize("bad", [torch.inf, 3e38])
@pytest.mark.parametrize("normalize", ["gradnorm", "row", None])
def test_what_is_not_finite_goes_through_when_asked(normalize, bad):
    """A row whose squares overflow is no row of zeros."""
    bucket = make_bucket(FEW)
    bucket.grads[-1][1, 2, 3] = bad
    transform = GradTransform(skip_nonfinite=False, skipped=torch.tensor(0))
    rule = WhiteningRule(normalize=normalize)
    whiten_(bucket.params, bucket.grads, bucket.steps, rule=rule, transform=transform, **HYPER)
    assert bucket.params[-1][1].isnan().all()
    assert all(p.isfinite().all() for p in [*bucket.params[:-1], bucket.params[-1][0], bucket.params[-1][2]])
    assert transform.skipped.item() == 0
    (d,) = whitened(bucket.grads[-1:], rule=rule)
    assert d[1].isnan().all()
    assert d[[0, 2]].isfinite().all()


def test_found_inf_leaves_everything():
    bucket = make_bucket(FEW)
    before = bucket.copies()
    for found, moves in ((1.0, False), (0.0, True)):
        transform = GradTransform(found_inf=torch.tensor(found))
        whiten_(bucket.params, bucket.grads, bucket.steps, rule=WhiteningRule(), transform=transform, **HYPER)
        assert all((s.item() != t.item()) == moves for s, t in zip(bucket.steps, before[4], strict=True))
        assert any((p != old).any() for p, old in zip(bucket.params, before[0], strict=True)) == moves
