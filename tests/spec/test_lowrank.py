"""Partial momentum in torch against the float64 oracle, and what it has to be at both ends of the ranks."""

import numpy as np
import pytest
import torch

from lowmem_kernels import GradTransform
from lowmem_kernels.elementwise import adamw_
from lowmem_kernels.lowrank import MAX_RANK, MomentumRule, partial_momentum_update_
from lowmem_kernels.lowrank.solver import triangular
from lowmem_kernels.testing import SHAPES, Case
from lowmem_kernels.testing.oracles import lowrank as exact
from lowrank_buckets import BF16_SR, FP32, HYPER, MOMENTA, PLAIN, SECONDS, make_momentum_bucket, numpy64, step_and_check

#: Cases of two or more dimensions; those of fewer go with moments that do not need matrices.
MATRICES = [case for case in SHAPES if len(case.shape) >= 2]
VECTORS = [case for case in SHAPES if len(case.shape) < 2]
RULES = {
    "gd": MomentumRule("gd"),
    "fixed": MomentumRule("fixed", refresh=3),
    "plain": MomentumRule(residual_scale=0.0),
    "rms": MomentumRule(update_clip=("rms", 0.5)),
    "elem": MomentumRule(update_clip=("elem", 0.75)),
}


def cases_of(momentum, second):
    """Of 30 matrices of 3 x 7 one is nearly of rank 2, where the third direction counts as none."""
    if momentum == "lowrank":
        return [case for case in MATRICES if case.name != "reversed_dims"]
    return MATRICES if second in ("cols", "factored") else [*MATRICES, *VECTORS]


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_form_and_shape(momentum, second, precision):
    step_and_check(make_momentum_bucket(cases_of(momentum, second), momentum, second, precision))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_rule(momentum, rule):
    if momentum == "lowrank" or rule.update_clip is not None:
        cases = [c for c in MATRICES if c.name in ("row", "odd_matrix", "experts", "transposed_param", "tile_less_1")]
        for second in ("element", "rows"):
            step_and_check(make_momentum_bucket(cases, momentum, second), rule)


TRANSFORM = dict(inv_scale=2.0**-3, clip_value=2.0**-11, clip_coef=0.5, maximize=True)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_gradient_transform(momentum):
    transform = GradTransform(
        **{k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in TRANSFORM.items()}
    )
    step_and_check(
        make_momentum_bucket([Case("matrix", (24, 43))], momentum, "element"), MomentumRule(), transform, TRANSFORM
    )


def run(shape, rank, steps, rule=PLAIN, betas=(0.9, 0.95), grads=None, seed=0):
    """(parameter, [momentum before each step], [gradients]) of low-rank steps with v of each element."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    p, v, step = torch.randn(m, n, generator=generator), torch.zeros(m, n), torch.zeros(())
    left, right = torch.zeros(m, rank), torch.linalg.qr(torch.randn(n, rank, generator=generator))[0].T.contiguous()
    grads = grads or [torch.randn(m, n, generator=generator) for _ in range(steps)]
    for g in grads:
        partial_momentum_update_(
            [p], [g], [step], lefts=[left], rights=[right], exp_avg_sqs=[v], rule=rule, **{**HYPER, "betas": betas}
        )
    return p, left @ right, grads, (left, right)


def adam(shape, grads, betas, seed=0):
    p = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    m, v, step = torch.zeros(shape), torch.zeros(shape), torch.zeros(())
    for g in grads:
        adamw_([p], [g], [m], [v], [step], **{**HYPER, "betas": betas})
    return p, m


def test_no_momentum_is_adam_without_beta1():
    """Rank 0: U = g. The bits are those of AdamW's, which divides by 1 - 0."""
    p, grads = torch.randn(9, 14), [torch.randn(9, 14) for _ in range(5)]
    q, v, w, steps = p.clone(), torch.zeros(9, 14), torch.zeros(9, 14), [torch.zeros(()), torch.zeros(())]
    for g in grads:
        partial_momentum_update_([p], [g], [steps[0]], exp_avg_sqs=[v], **HYPER)
        adamw_([q], [g], [torch.zeros(9, 14)], [w], [steps[1]], **{**HYPER, "betas": (0.0, 0.95)})
    torch.testing.assert_close(p, q, rtol=2e-7, atol=1e-7)
    assert torch.equal(v, w)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 8), (8, 1)])
def test_full_rank_is_adam(shape):
    """L R = A, so nothing is left over. A condition of 100 of the gradients' sum makes 1e-5 of a momentum."""
    p, momentum, grads, _ = run(shape, min(shape), 20)
    q, m = adam(shape, grads, (0.9, 0.95))
    torch.testing.assert_close(momentum, m, rtol=0, atol=2e-5)
    torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", ["power", "gd", "fixed"])
def test_applied_updates_sum_to_the_gradients(solver):
    """Without bias correction sum U = sum G - b / (1 - b) M_T, whatever the solver does.

    A step applies U where eps is so large that v is nothing beside it, and lr as large; the correction of the first
    moment is taken out by hand.
    """
    beta, shape = 0.9, (16, 28)
    generator = torch.Generator().manual_seed(3)
    left, right = torch.zeros(16, 4), torch.linalg.qr(torch.randn(28, 4, generator=generator))[0].T.contiguous()
    grads = [torch.randn(shape, generator=generator) for _ in range(30)]
    applied, p, step = np.zeros(shape), torch.zeros(shape), torch.zeros(())
    for t, g in enumerate(grads, 1):
        before = numpy64(p).copy()
        partial_momentum_update_(
            [p], [g], [step], lefts=[left], rights=[right], exp_avg_sqs=[torch.zeros(shape)], lr=2.0**20,
            betas=(beta, 0.5), eps=2.0**20, weight_decay=0.0, rule=MomentumRule(solver, refresh=7),
        )  # fmt: skip
        momentum = numpy64(left) @ numpy64(right)
        applied += before - numpy64(p) - momentum * (1 / (1 - beta**t) - 1)
    total = sum(map(numpy64, grads))
    expected = total - beta / (1 - beta) * momentum
    # 30 sums of numbers up to 10, and sqrt(v) beside eps: 1e-6 of it
    assert np.abs(applied - expected).max() <= 3e-5 * np.abs(expected).max()
    assert np.abs(momentum).max() > 0.1


def test_a_stationary_gradient_is_followed_without_bias():
    """The mean of U is that of G, also in the part that the factors do not hold; without the residual it is not."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(24, 32))
    for gamma, bias in ((1.0, 0.02), (0.0, None)):
        left, right = np.zeros((24, 2)), np.linalg.qr(rng.normal(size=(32, 2)))[0].T
        total, noise = 0, 0
        for t in range(1, 2001):
            g = signal + 0.1 * rng.normal(size=signal.shape)
            u, left, right = exact.momentum_of(left, right, g, t, 0.9, gamma)
            total, noise = total + u, noise + g
        error = np.linalg.norm(total - noise) / np.linalg.norm(noise)
        assert error < bias if bias else error > 0.5


@pytest.mark.parametrize("solver", ["power", "gd", "fixed"])
@pytest.mark.parametrize("kind", ["zero", "rank 1", "zero at first", "zero rows and columns", "tiny", "large"])
def test_degenerate_gradients(kind, solver):
    """Nothing is NaN, updates are bounded, and the factors can follow as soon as there is something to follow."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(24, 40, generator=generator) for _ in range(12)]
    outer = torch.outer(torch.randn(24, generator=generator), torch.randn(40, generator=generator))
    grads = {
        "zero": [0 * g for g in noise],
        "rank 1": [outer for g in noise],
        "zero at first": [0 * g if t < 4 else g for t, g in enumerate(noise)],
        "zero rows and columns": [g * (torch.arange(24) % 3 > 0)[:, None] * (torch.arange(40) % 3 > 0) for g in noise],
        "tiny": [1e-18 * g for g in noise],
        "large": [1e12 * g for g in noise],
    }[kind]
    # without a clip, an element whose gradients have been tiny goes as far as its row's and column's momentum says
    rule = MomentumRule(solver, refresh=4, update_clip=("elem", 5.0))
    p, momentum, _, (left, right) = run((24, 40), 6, 0, rule, grads=grads)
    start, *_ = run((24, 40), 6, 0, rule, grads=[0 * noise[0]] * len(grads))
    assert p.isfinite().all()
    assert momentum.isfinite().all()
    assert (p - start).abs().max() <= HYPER["lr"] * 12 * 5.01
    if kind == "zero":
        assert torch.equal(p, start)
        assert (left == 0).all()
    if kind == "rank 1" and solver != "gd":
        # the momentum is all of A, whose weights sum up to 1 - b1^t
        torch.testing.assert_close(momentum, outer * (1 - 0.9**12), rtol=1e-5, atol=1e-5)
    if kind == "zero rows and columns" and solver == "power":
        assert (momentum[::3] == 0).all()
        assert (momentum[:, ::3] == 0).all()
    # and orthonormal rows to go on with
    np.testing.assert_allclose(numpy64(right @ right.T), np.eye(6), atol=1e-4)
    if kind == "zero at first":
        assert np.linalg.matrix_rank(numpy64(momentum), tol=1e-3) == 6


def test_triangular():
    """Cholesky, but for columns that depend on others, which are zeros."""
    y = np.random.default_rng(0).normal(size=(40, 6)) * np.array([1, 1e-6, 1, 1e6, 1, 1])
    y[:, 2] = y[:, 0] * 0.5
    y[:, 4] = 0
    gram = torch.from_numpy(y.T @ y)
    lower, inverse = triangular(gram)
    live = [0, 1, 3, 5]
    expected = np.linalg.cholesky(numpy64(gram)[np.ix_(live, live)])
    np.testing.assert_allclose(numpy64(lower)[np.ix_(live, live)], expected, rtol=1e-9)
    assert (lower[:, [2, 4]] == 0).all()
    assert (inverse[[2, 4]] == 0).all()
    assert (inverse[:, [2, 4]] == 0).all()
    q = y @ numpy64(inverse).T
    np.testing.assert_allclose(q.T @ q, np.diag([1.0, 1, 0, 1, 0, 1]), atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize(
    ("momentum", "second", "clip", "kept"),
    [
        ("none", "element", None, "element"),
        ("full", "element", None, "element"),
        ("full", "rows", None, "row"),
        ("full", "heads", None, "parameter"),
        ("full", "cols", None, "parameter"),
        ("full", "element", ("rms", 1.0), "parameter"),
        ("none", "rows", ("rms", 1.0), "parameter"),
        ("lowrank", "element", None, "parameter"),
    ],
)
def test_what_is_not_finite_is_kept(momentum, second, clip, kept, bad):
    """3e38 is finite, but its square is not: where only g² is looked at, it stays."""
    bucket, clean = (make_momentum_bucket([Case("a", (6, 8)), Case("b", (12, 16))], momentum, second) for _ in range(2))
    bucket.grads[1][3, 5] = bad
    before = [t.clone() for t in bucket.everything()]
    skipped = torch.tensor(4)
    rule = MomentumRule(update_clip=clip)
    with np.errstate(all="ignore"):
        bucket.run(rule=rule, transform=GradTransform(skipped=skipped))
        clean.run(rule=rule)
    if second == "element" and momentum != "lowrank" and bad == 3e38:
        assert skipped.item() == 4
        return
    assert skipped.item() == 5
    names = [("params", 0), ("params", 1), ("steps", 0), ("steps", 1), *((k, i) for k in bucket.states for i in (0, 1))]
    for (name, i), now, old, other in zip(names, bucket.everything(), before, clean.everything(), strict=True):
        expected = other.clone()
        if i == 1 and kept == "parameter":
            expected = old
        elif i == 1 and kept == "row" and name != "steps":
            expected[3] = old[3]
        elif i == 1 and kept == "element" and name != "steps":
            expected[3, 5] = old[3, 5]
        assert torch.equal(now, expected), (name, i)


def test_found_inf_leaves_everything():
    bucket = make_momentum_bucket([Case("a", (6, 8))], "lowrank", "factored")
    before = [t.clone() for t in bucket.everything()]
    bucket.run(transform=GradTransform(found_inf=torch.tensor(1.0)))
    assert all(map(torch.equal, bucket.everything(), before))


def lists(momentum="lowrank", second="element", shape=(6, 8)):
    bucket = make_momentum_bucket([Case("a", shape)], momentum, second)
    return bucket.params, bucket.grads, bucket.steps, bucket.states


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lefts": None}, "one of lefts and rights is None"),
        ({"exp_avgs": [torch.zeros(6, 8)]}, "exp_avgs is a list, and so is lefts"),
        ({"exp_avg_sqs": None}, "allowed second moments"),
        ({"row_sqs": [torch.zeros(6)]}, "allowed second moments"),
        ({"exp_avg_sqs": [torch.zeros(8, 6)]}, r"exp_avg_sqs\[0\] has shape \(8, 6\); allowed: \(6, 8\)"),
        ({"lefts": [torch.zeros(6, 4)]}, r"lefts\[0\] has shape \(6, 4\); allowed: \(6, 3\)"),
        ({"rights": [torch.zeros(7, 8)]}, r"rights\[0\] has rank 7; allowed: at most 64"),
        ({"exp_avg_sqs": []}, "exp_avg_sqs has 0 entries; allowed: 1, one for each parameter"),
        ({"rights": [None]}, r"rights\[0\] is None; allowed: a tensor"),
        ({"exp_avg_sqs": None, "row_sqs": [torch.zeros(4)]}, r"row_sqs\[0\] has 4 elements for 6 rows"),
        ({"exp_avg_sqs": None, "col_sqs": [torch.zeros(3)]}, r"col_sqs\[0\] has 3 elements for 8 columns"),
        (
            {"exp_avg_sqs": None, "row_sqs": [torch.zeros(3)], "col_sqs": [torch.zeros(8)]},
            r"row_sqs\[0\] has 3 elements .*allowed: 6, one for each",
        ),
    ],
)
def test_lists_that_do_not_fit(changed, message):
    params, grads, steps, states = lists()
    with pytest.raises(ValueError, match=message):
        partial_momentum_update_(params, grads, steps, **{**states, **changed}, **HYPER)
    assert steps[0].item() == 0


def test_other_refusals():
    params, grads, steps, states = lists()
    with pytest.raises(TypeError, match=r"lefts\[0\] is bfloat16; allowed: float32"):
        partial_momentum_update_(params, grads, steps, **{**states, "lefts": [states["lefts"][0].bfloat16()]}, **HYPER)
    vector = torch.zeros(5)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(5,\); allowed: two or more dimensions"):
        partial_momentum_update_([vector], [vector], steps, col_sqs=[torch.zeros(5)], **HYPER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(solver="svd"), "rule.solver is 'svd'; allowed: 'power', 'gd', 'fixed'"),
        (dict(refresh=0), "rule.refresh is 0; allowed: an integer of at least 1"),
        (dict(residual_scale=1.5), r"rule.residual_scale is 1.5; allowed: a number in \[0, 1\]"),
        (dict(update_clip=("max", 1.0)), "rule.update_clip is .*; allowed: None"),
        (dict(update_clip=("rms", 0.0)), "rule.update_clip is"),
    ],
)
def test_rules_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumRule(**options)


def test_largest_rank():
    step_and_check(make_momentum_bucket([Case("a", (70, 72))], "lowrank", "element"))
    params, grads, steps, states = lists(shape=(80, 90))
    states = {**states, "lefts": [torch.zeros(80, MAX_RANK + 1)], "rights": [torch.zeros(MAX_RANK + 1, 90)]}
    with pytest.raises(ValueError, match="has rank 65; allowed: at most 64"):
        partial_momentum_update_(params, grads, steps, **states, **HYPER)
