"""The multi-normalization reference against float64 NumPy that divides the matrix by each norm in turn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import oracles
from lowmem_kernels import GradTransform
from lowmem_kernels.multinorm import NormRule, rank1_apply_, sinkhorn_scales
from lowmem_kernels.rounding import store_stochastic_, stream_key
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, Precision, assert_rounded, assert_same_bits, make_tensors
from multinorm_buckets import HYPER, RULES, make_bucket
from multinorm_oracle import FACTORED, as_matrices, multinorm, step, step_error

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)

every_rule = pytest.mark.parametrize("name", RULES)


def numpy64(tensor):
    return tensor.detach().double().numpy().astype(np.float64)


def scaled(grad, rule):
    """X in float64 of the two vectors and the gradient."""
    (s,), (t,) = sinkhorn_scales([grad], rule=rule)
    g = np.sign(numpy64(grad)) if "sign" in rule.norms else numpy64(grad)
    matrices = as_matrices(g, rule.conv)
    return (
        numpy64(s).reshape(*matrices.shape[:2], 1) * matrices * numpy64(t).reshape(len(matrices), 1, matrices.shape[2])
    ).reshape(g.shape)


def assert_elements_close(actual, expected, relative):
    assert (np.abs(actual - expected) <= relative * np.abs(expected)).all(), np.abs(actual - expected).max()


@pytest.mark.parametrize("case", SHAPES, ids=str)
@every_rule
def test_scale_vectors_are_the_literal_iteration(name, case):
    rule = replace(RULES[name], momentum=0.0, nesterov=False, momentum_after=False)
    grad = make_tensors(case, torch.float32, 3)[1]
    assert_elements_close(scaled(grad, rule), multinorm(numpy64(grad), rule), FACTORED)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@every_rule
def test_a_step(name, precision):
    """All that is written is the exact result, off by what vectors and a few operations in fp32 are, rounded once."""
    rule = RULES[name]
    bucket = make_bucket(SHAPES, precision)
    before = bucket.copies()
    bucket.run(rule)
    for i, (old_p, grad, old_m, t) in enumerate(zip(*before, strict=True)):
        state = [numpy64(x) for x in (old_p, grad, old_m)]
        p, m = map(torch.from_numpy, step(*state, rule, **HYPER))
        p_error, m_error = map(torch.as_tensor, step_error(*state, rule, **HYPER))
        assert_rounded(bucket.params[i], p, p_error, stochastic=precision.stochastic)
        if rule.momentum:
            assert_rounded(bucket.exp_avgs[i], m, m_error, stochastic=precision.stochastic)
        else:
            assert_same_bits(bucket.exp_avgs[i], old_m)
        assert bucket.steps[i] == t + 1


@pytest.mark.parametrize("name", ["sinkgd", "table", "momentum_after"])
def test_stochastic_rounding_draws_for_parameter_and_step(name):
    """The bfloat16 results are those of a float32 run, rounded with the noise that rounding.py says."""
    bucket, exact = make_bucket(SHAPES, BF16_SR), make_bucket(SHAPES, BF16_SR)
    exact.params = [p.float() for p in exact.params]
    exact.exp_avgs = [m.float() for m in exact.exp_avgs]
    bucket.run(RULES[name])
    exact.run(RULES[name])
    for i, key in enumerate(bucket.rounding().keys(len(SHAPES))):
        pairs = [(bucket.params[i], exact.params[i]), (bucket.exp_avgs[i], exact.exp_avgs[i])]
        for stream, (rounded, value) in enumerate(pairs[: 1 + bool(RULES[name].momentum)]):
            expected = torch.empty(value.shape, dtype=torch.bfloat16)
            stream = stream_key(key, int(bucket.steps[i]), stream)
            store_stochastic_(expected, value.clone(memory_format=torch.contiguous_format), stream, 0)
            assert_same_bits(rounded.contiguous(), expected, str(SHAPES[i]))


@pytest.mark.parametrize(
    "transform",
    [
        dict(inv_scale=1 / 1024, maximize=True),
        dict(clip_value=1e-3),
        dict(clip_coef=0.37, clip_value=2e-3, inv_scale=3.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["clamped", "momentum_before", "sinkgd"])
def test_the_gradient_is_transformed(name, transform):
    rule = RULES[name]
    bucket = make_bucket(SHAPES)
    before = bucket.copies()
    tensors = {k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in transform.items()}
    bucket.run(rule, transform=GradTransform(**tensors))
    for i, (old_p, grad, old_m, _) in enumerate(zip(*before, strict=True)):
        g, _ = oracles.transformed(numpy64(grad), **transform)
        state = (numpy64(old_p), g, numpy64(old_m))
        p, _ = step(*state, rule, **HYPER)
        p_error, _ = step_error(*state, rule, **HYPER)
        assert_rounded(bucket.params[i], torch.from_numpy(p), torch.as_tensor(p_error))


def test_rank_one_gradients_become_their_signs():
    a, b = torch.randn(37), torch.randn(29)
    for norms in (("row", "col"), ("col", "row")):
        x = scaled(torch.outer(a, b), NormRule(norms))
        assert_elements_close(x, np.sign(np.outer(a, b)), FACTORED)


@pytest.mark.parametrize("shape", [(1, 515), (515, 1), (7,)])
def test_single_rows_and_columns_become_signs(shape):
    g = torch.randn(shape)
    assert_elements_close(scaled(g, NormRule()), np.sign(numpy64(g)), FACTORED)


@pytest.mark.parametrize("exponent", [-12, -6, 6, 12])
@pytest.mark.parametrize("name", ["sinkgd", "row", "col", "frobenius", "row_then_all"])
def test_the_scale_of_a_gradient_does_not_matter(name, exponent):
    g = torch.randn(48, 40) * torch.randn(48, 40).exp()
    for factor in (10.0**exponent, 2.0 ** (3 * exponent)):
        assert_elements_close(scaled(g * factor, RULES[name]), scaled(g, RULES[name]), FACTORED)


def test_scaling_by_powers_of_two_changes_no_bit():
    """Sums, roots and quotients scale exactly, so that loss scaling and averaging of micro-batches are free."""
    grads = [make_tensors(case, torch.float32, 1)[1] for case in SHAPES]
    buckets = [make_bucket(SHAPES) for _ in range(2)]
    for bucket, factor in zip(buckets, (1.0, 2.0**16), strict=True):
        bucket.grads = [g * factor for g in grads]
        bucket.run(RULES["sinkgd"])
    for a, b in zip(buckets[0].params, buckets[1].params, strict=True):
        assert_same_bits(a, b)


def test_the_order_matters_after_one_iteration():
    """So the order is part of a rule: far apart after one pair, close after five."""
    g = torch.randn(64, 96) * torch.randn(64, 1).mul(2).exp() * torch.randn(96).mul(2).exp()
    apart = {}
    for times in (1, 5):
        a, b = (scaled(g, NormRule(norms * times)) for norms in (("row", "col"), ("col", "row")))
        apart[times] = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert_elements_close(a, multinorm(numpy64(g), NormRule(("row", "col") * times)), FACTORED)
    assert apart[1] > 0.05
    assert apart[5] < apart[1] / 10


def test_zero_rows_and_columns_stay_zero():
    """Their scales are 0: a bound on the norms instead would let them grow with every iteration, to Inf and NaN."""
    g = torch.randn(40, 30)
    g[::3], g[:, 5] = 0, 0
    for eps in (None, 1e-8):
        (s,), (t,) = sinkhorn_scales([g], rule=NormRule(eps=eps))
        assert (s[::3] == 0).all()
        assert t[5] == 0
        x = scaled(g, NormRule(eps=eps))
        assert_elements_close(x, multinorm(numpy64(g), NormRule(eps=eps)), FACTORED)


@pytest.mark.parametrize("kind", ["heavy_tails", "two_percent", "zipf_rows", "outlier_columns"])
def test_hard_gradients(kind):
    """Whatever is in them, vectors in fp32 are as good: nothing is rounded between iterations."""
    g = torch.randn(160, 200)
    if kind == "heavy_tails":
        g = g * torch.randn(160, 200).mul(3).exp()
    elif kind == "two_percent":
        g = torch.where(torch.rand(160, 200) < 0.02, g, 0.0)
    elif kind == "zipf_rows":
        g = g / torch.arange(1, 161)[:, None] ** 2 * (torch.rand(160, 1) < 0.4)
    else:
        g[:, ::50] *= 1e3
    for rule in (NormRule(), NormRule(("row", "col") * 5 + ("row",), row_threshold=1e-3)):
        assert_elements_close(scaled(g, rule), multinorm(numpy64(g), rule), FACTORED)


def test_a_sequence_is_what_its_last_norms_make_of_it():
    """A sign forgets what came before it, a norm twice is one, and a scale goes at the next norm."""
    g = torch.randn(12, 18)
    for norms in (
        ("row", "row", "col"), ("col", "sign", "row"), ("frobenius", "row", "col"), ("row", "frobenius", "sign"),
        ("sign", "frobenius"), ("row", "frobenius", "frobenius"), ("row", "frobenius", "row"),
    ):  # fmt: skip
        assert_elements_close(scaled(g, NormRule(norms)), multinorm(numpy64(g), NormRule(norms)), FACTORED)


def test_a_threshold_makes_small_rows_zero():
    g = torch.randn(10, 6)
    g[4] *= 1e-2
    rule = NormRule(("row", "col", "row"), row_threshold=0.1)
    x = scaled(g, rule)
    assert (x[4] == 0).all()
    assert_elements_close((x**2).mean(1), np.where(np.arange(10) == 4, 0.0, 1.0), FACTORED)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_rank1_apply(sign, offsets, conv):
    """p - lr (s t f(g) + a + b + wd p), of every shape."""
    bucket = make_bucket(SHAPES)
    before = bucket.copies()
    vectors = [sinkhorn_scales(bucket.grads, rule=NormRule(("row", "col"), conv=conv)) for _ in range(1 + offsets)]
    a, b = [[torch.randn_like(v) for v in side] for side in vectors[-1]] if offsets else (None, None)
    s, t = vectors[0]
    options = dict(sign=sign, conv=conv, row_offsets=a, col_offsets=b, **HYPER)
    rank1_apply_(bucket.params, bucket.grads, s, t, bucket.steps, **options)
    for i, (p, grad, _, steps) in enumerate(zip(*before, strict=True)):
        g = as_matrices(np.sign(numpy64(grad)) if sign else numpy64(grad), conv)
        rows = [numpy64(v[i]).reshape(*g.shape[:2], 1) for v in (s, a) if v is not None]
        cols = [numpy64(v[i]).reshape(len(g), 1, g.shape[2]) for v in (t, b) if v is not None]
        x = rows[0] * g * cols[0] + (rows[1] + cols[1] if offsets else 0)
        exact = np.asarray(numpy64(p)) - HYPER["lr"] * (x.reshape(p.shape) + HYPER["weight_decay"] * numpy64(p))
        # products and sums of a few numbers, each rounded once
        scale = HYPER["lr"] * sum(np.abs(v).max(initial=0.0) for v in (x, *rows[1:], *cols[1:])) + np.abs(numpy64(p))
        assert_rounded(bucket.params[i], torch.from_numpy(np.asarray(exact)), torch.as_tensor(6 * 2.0**-24 * scale))
        assert bucket.steps[i] == steps + 1


def test_a_large_matrix_in_blocks():
    """Sums over several blocks of rows, and over several matrices in one."""
    cases = [Case("tall", (700, 513)), Case("stack", (5, 300, 260)), Case("wide", (3, 140000))]
    for case in cases:
        grad = make_tensors(case, torch.float32, 3)[1]
        assert_elements_close(scaled(grad, NormRule()), multinorm(numpy64(grad), NormRule()), FACTORED)
