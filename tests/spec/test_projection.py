"""The projection reference against float64 NumPy, and projections against what is known of them."""

import hashlib
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from lowmem_kernels import GradTransform
from lowmem_kernels.lines import matrix_shape
from lowmem_kernels.projection import ApolloRule, Draw, channel_apply_, project, projection_matrix
from lowmem_kernels.projection.draw import is_shared
from lowmem_kernels.projection.normal import normals
from lowmem_kernels.projection.rule import sides_of
from lowmem_kernels.testing import PRECISIONS, SHAPES, Case, assert_rounded, make_tensors
from lowmem_kernels.testing.oracles.projection import is_right, step, step_error
from projection_buckets import HYPER, RULES, SEED, make_bucket

SOURCES = ("gaussian", "rademacher", "torch")


def numpy64(tensor):
    return tensor.detach().double().numpy()


def matrices(tensor, shape, conv):
    """float64 [E, m, n] of what has the parameter's shape, or that of its moments."""
    e, m, n = matrix_shape(tuple(shape), conv)
    array = numpy64(tensor)
    if array.shape == tuple(shape):
        return array.reshape(e, m, n)
    return array.reshape(e, *array.shape[-2:])


def exact_step(before, i, rule, uid):
    """(new, largest error) of p, m and v of parameter i, stacked as they are, and its new norms."""
    p, g, m, v, norms, _, t = (column[i] for column in before)
    o = {**asdict(rule), **HYPER, "disable_nl": rule.growth_limit is None}
    draw = Draw("gaussian", SEED, [uid], 3)
    made = dict(rank=rule.rank, draw=draw, proj_type=rule.proj_type, conv=rule.conv)
    projection = numpy64(projection_matrix(p.shape, **made))
    results, errors, new_norms = [], [], []
    stacks = [matrices(x, p.shape, rule.conv) for x in (p, g, m, v)]
    for w, grad, first, second, last in zip(*stacks, norms.reshape(-1), strict=True):
        turn = (lambda x: x.T) if is_right(w.shape, rule.proj_type) else (lambda x: x)
        args = [turn(x) for x in (w, grad, first, second)]
        *new, norm = step(*args, float(last), float(t) + 1, projection, o)
        error = step_error(*args, float(t) + 1, projection, o, new)
        results.append([turn(x) for x in new])
        errors.append([turn(x) for x in error])
        new_norms.append(norm)
    shapes = (p.shape, m.shape, v.shape)
    pack = lambda found: [  # noqa: E731
        torch.from_numpy(np.array([each[k] for each in found])).reshape(shape) for k, shape in enumerate(shapes)
    ]
    return pack(results), pack(errors), torch.tensor(new_norms, dtype=torch.float64).reshape(norms.shape)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_step(name, precision):
    """All that is written is the exact result, off by what sums in fp32 are, rounded once."""
    rule = RULES[name]
    bucket = make_bucket(SHAPES, rule, precision)
    before = bucket.copies()
    bucket.run(rule)
    uids = bucket.uids()
    for i in range(len(SHAPES)):
        new, errors, norms = exact_step(before, i, rule, uids[i])
        for column, exact, error in zip((bucket.params, bucket.exp_avgs, bucket.exp_avg_sqs), new, errors, strict=True):
            assert_rounded(column[i], exact, error, stochastic=precision.stochastic)
        # of a matrix whose channels are one element each, R can be small by chance: 1e-4 for a few
        torch.testing.assert_close(bucket.norms[i].double(), norms, rtol=1e-4, atol=0)
        assert bucket.steps[i] == before[-1][i] + 1
        assert bucket.epochs[i] == 3


@pytest.mark.parametrize("transform", [
    dict(inv_scale=torch.tensor(1 / 1024), maximize=True), dict(clip_value=1e-3, clip_coef=torch.tensor(0.37)),
], ids=["scaled", "clipped"])  # fmt: skip
def test_the_gradient_is_transformed(transform):
    """As a gradient that was transformed before."""
    rule = RULES["rank_4"]
    actual, expected = make_bucket(SHAPES, rule), make_bucket(SHAPES, rule)
    actual.run(rule, transform=GradTransform(**transform))
    for i, g in enumerate(expected.grads):
        g = g * transform.get("inv_scale", 1.0) * (-1 if transform.get("maximize") else 1)
        bound = transform.get("clip_value", math.inf)
        expected.grads[i] = g.clamp(-bound, bound) * transform.get("clip_coef", 1.0)
    expected.run(rule)
    for p, q in zip(actual.params, expected.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mini", "rank_4", "rank_20_left", "convolution", "full"])
def test_project(name, case):
    """Sums of at most 1024 products, each off by half a spacing of the sum of their sizes."""
    rule, grad = RULES[name], make_tensors(case, torch.float32, 3)[1]
    draw = Draw("gaussian", SEED, [17], 5)
    made = dict(rank=rule.rank, draw=draw, proj_type=rule.proj_type, conv=rule.conv)
    (projected,), (squares,) = project([grad], **made)
    g, p = matrices(grad, case.shape, rule.conv), numpy64(projection_matrix(case.shape, **made))
    right = is_right(g.shape[1:], rule.proj_type)
    r, size = (x @ y.T if right else y @ x for x, y in ((g, p), (np.abs(g), np.abs(p))))
    assert projected.dtype is squares.dtype is torch.float32
    assert (np.abs(numpy64(projected).reshape(r.shape) - r) <= 16 * 2**-24 * size).all()
    np.testing.assert_allclose(numpy64(squares).reshape(len(g), -1), (g**2).sum(2 if right else 1), rtol=2e-6)


@pytest.mark.parametrize("proj_type", ["std", "left"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_channel_apply(case, proj_type):
    param, grad = make_tensors(case, torch.float32, 3)
    sides = sides_of(case.shape, 1, proj_type, False)
    scales = torch.rand(*case.shape[:-2], sides.channels)
    before, step_counter = numpy64(param.clone()), torch.zeros(())
    channel_apply_([param], [grad], [scales], [step_counter], **HYPER, proj_type=proj_type)
    g = matrices(grad, case.shape, False)
    s = numpy64(scales).reshape(len(g), -1)
    moved = before - HYPER["lr"] * (s[:, :, None] if sides.right else s[:, None]).__mul__(g).reshape(case.shape)
    exact = moved - HYPER["lr"] * HYPER["weight_decay"] * moved
    # p, the update and the decay, each rounded, and the difference
    assert (np.abs(numpy64(param) - exact) <= 4 * 2.0**-24 * (np.abs(before) + np.abs(moved - before))).all()
    assert step_counter == 1


# projections


def test_normal_numbers():
    """What they are made of, against NumPy, and that they are normal: moments and quantiles of a million."""
    words = torch.randint(0, 2**32, (2, 500_000))
    words[:, 0], words[:, 1] = 0, 2**32 - 1
    u, v = ((numpy64(word.double()) // 256) * 2.0**-24 for word in words)
    radius = np.sqrt(-2 * np.log((u + 2.0**-25).astype(np.float32).astype(np.float64)))
    z = torch.stack(normals(*words))
    np.testing.assert_allclose(numpy64(z), radius * np.array([np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)]), atol=2e-6)
    z = z.flatten().double()
    # five standard errors of each
    assert abs(z.mean()) < 5e-3
    assert abs(z.var() - 1) < 7e-3
    assert abs((z**4).mean() - 3) < 5e-2
    quantiles = torch.quantile(z[:500_000], torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64))
    expected = torch.tensor([-3.0902, -1.2816, 0, 1.2816, 3.0902])
    torch.testing.assert_close(quantiles.float(), expected, rtol=0, atol=5e-2)


def test_projections_stay_what_they_are():
    """Training that is resumed with another version of this package goes on with the same projections."""
    digests = {
        (rank, source): hashlib.sha256(
            projection_matrix((64, 37), rank=rank, draw=Draw(source, -5, [2**40], 9)).numpy().tobytes()
        ).hexdigest()[:16]
        for rank, source in ((1, "gaussian"), (3, "gaussian"), (8, "rademacher"))
    }
    assert digests == {
        (1, "gaussian"): "15e5cded73bc08c7",
        (3, "gaussian"): "372bf47a36290697",
        (8, "rademacher"): "8b440deb4dddbcd9",
    }


@pytest.mark.parametrize("source", SOURCES)
def test_norms_are_kept_on_average(source):
    """E |Px|² = |x|², with the variance that 1600 draws of rank 8 have within four standard errors."""
    rank, x = 8, torch.randn(48, dtype=torch.float64)
    x /= x.norm()
    squares = torch.stack([
        (projection_matrix((64, 48), rank=rank, draw=Draw(source, seed, epoch=e)).double() @ x).square().sum()
        for seed in range(40) for e in range(1, 41)
    ])  # fmt: skip
    variance = 2 / rank * (1 - (x**4).sum() if source == "rademacher" else 1)
    assert abs(squares.mean() - 1) < 4 * math.sqrt(variance / len(squares))
    # that of the variance of a sum of 8 squares of normal numbers, whose fourth moment is 12 / 8 + 3 of its square
    assert abs(squares.var() / variance - 1) < 4 * math.sqrt((2 + 12 / rank) / len(squares))


def test_entries_depend_on_their_place_only():
    """Not on how many there are: a longer one begins with the same, and rows of a higher rank do at rank 1's key."""
    draw = Draw(seed=3, uids=[5])
    long, short = (projection_matrix((900, n), rank=1, draw=draw) for n in (700, 333))
    assert torch.equal(long[:, :333], short)


@pytest.mark.parametrize(("rank", "own"), [(1, True), (2, False), (16, False)])
def test_who_shares_a_projection(rank, own):
    """At rank 1 nobody; from 2 on parameters with as many contracted elements, and the same rank."""
    assert is_shared(sides_of((64, 32), rank, "std", False), "gaussian") is not own

    def make(shape, uid, epoch=1, seed=0, rank=rank):
        return projection_matrix(shape, rank=rank, draw=Draw("gaussian", seed, [uid], epoch))

    first = make((64, 32), 1)
    assert torch.equal(first, make((64, 32), 2)) is not own
    assert torch.equal(first, make((32, 80), 1))
    for other in (make((64, 32), 1, epoch=2), make((64, 32), 1, seed=1), make((64, 32), 7, epoch=2)):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 4 / math.sqrt(32 * rank)


def test_the_source_torch_is_a_seeded_generator():
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    def make(shape, epoch):
        return projection_matrix(shape, rank=4, draw=Draw("torch", 10, [2], epoch)) * 2

    assert torch.equal(make((40, 30), 1), torch.randn(4, 30, generator=generator(13)))
    # of columns as channels, as the authors have it
    assert torch.equal(make((30, 40), 1), torch.randn(30, 4, generator=generator(13)).T)
    following = [torch.randint(0, 2**63 - 1, (1,), generator=g).item() for g in [generator(13)] for _ in range(15)][-1]
    assert torch.equal(make((40, 30), 2), torch.randn(4, 30, generator=generator(following)))


def test_shards_add_up_to_the_whole():
    """What a process with some of the contracted elements would compute, of the projection of the whole parameter."""
    grad, draw = torch.randn(60, 40), Draw(seed=1)
    (whole,), (squares,) = project([grad], rank=4, draw=draw)
    matrix = projection_matrix((60, 40), rank=4, draw=draw)
    parts = [(slice(0, 13), 0), (slice(13, 13), 1), (slice(13, 40), 2)]
    torch.testing.assert_close(sum(grad[:, part] @ matrix[:, part].T for part, _ in parts), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(grad[:, part].square().sum(1) for part, _ in parts), squares)
    # the side is that of the whole: a quarter of its rows alone would be projected otherwise
    assert sides_of((60, 40), 4, "std", False).right
    assert not sides_of((15, 40), 4, "std", False).right


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (1, 9), (9, 1), (3, 8, 8)])
def test_full_rank_needs_no_projection(shape):
    """R is the gradient, and moments take as much as Adam's: with one channel for each element, this is Adam."""
    rule = ApolloRule(64)
    bucket = make_bucket([Case("case", shape)], rule)
    assert bucket.exp_avgs[0].shape == shape
    draw = Draw(seed=1)
    assert torch.equal(projection_matrix(shape, rank=64, draw=draw), torch.eye(min(shape[-2:])))
    (projected,), _ = project(bucket.grads, rank=64, draw=draw)
    assert torch.equal(projected, bucket.grads[0])
