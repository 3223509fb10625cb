"""The elementwise reference against float64 NumPy, step by step: every stored value is the exact result rounded once.

Each step is compared from the state actually stored before it, so nothing accumulates and the bound is that of one
step's fp32 arithmetic, derived in oracles.py, plus one rounding to the stored dtype.
"""

import numpy as np
import pytest
import torch

import oracles
from buckets import ADAMW, FP32, SCALED_UPDATE, SEED, make_bucket, set_gradients
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.elementwise import grad_stats, reference
from lowmem_kernels.testing import (
    DTYPES,
    PRECISIONS,
    SHAPES,
    Case,
    Precision,
    assert_parity,
    assert_rounded,
    assert_same_bits,
    make_tensors,
)

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.float32, stochastic=True)
FEW = [case for case in SHAPES if case.name in ("scalar", "empty", "odd_matrix", "transposed_param", "experts")]


def numpy64(tensor):
    return tensor.detach().double().numpy().astype(np.float64)


def step_and_check(bucket, verb, transform=None, gradient=None, **options):
    """One step, and all it wrote against the oracle. ``gradient``: oracles.transformed's arguments."""
    hyper = {**(ADAMW if verb == "adamw" else SCALED_UPDATE), **options}
    before = bucket.copies()
    bucket.run(verb, transform=transform or GradTransform(), **hyper)
    hyper["lr"] = float(hyper["lr"])
    for i in range(len(bucket.params)):
        p, grad, m, v = (numpy64(column[i]) for column in before[:4])
        t = before[4][i].item() + 1
        assert bucket.steps[i].item() == t
        assert_same_bits(bucket.grads[i], before[1][i], "grad is only read")
        g, usable = oracles.transformed(grad, **(gradient or {}))
        finite = torch.from_numpy(np.asarray(usable))
        with np.errstate(invalid="ignore", over="ignore"):
            if verb == "adamw":
                exact = oracles.adamw(p, g, m, v, t, **hyper)
                error = oracles.adamw_error(p, g, m, v, t, **hyper)
            else:
                exact = (oracles.scaled_update(p, g, **hyper), m, v)
                error = (oracles.scaled_update_error(p, g, **hyper), 0 * m, 0 * v)
        written = (bucket.params[i], bucket.exp_avgs[i], bucket.exp_avg_sqs[i])
        for stream, (name, actual) in enumerate(zip(("param", "exp_avg", "exp_avg_sq"), written, strict=True)):
            old = before[(0, 2, 3)[stream]][i]
            assert_same_bits(actual[~finite], old[~finite], f"{name}[{i}] where kept")
            if stream and verb == "scaled_update":
                continue
            x, e = (torch.from_numpy(np.asarray(a[stream]))[finite] for a in (exact, error))
            stochastic = bucket.precision.stochastic and actual.dtype is torch.bfloat16
            assert_rounded(actual[finite], x, e, stochastic=stochastic, name=f"{name}[{i}]")
            if stochastic:
                check_noise(bucket, i, int(t), stream, actual, np.asarray(exact[stream]), usable)


def check_noise(bucket, i, step, stream, actual, exact, finite):
    """Elements are rounded with the documented noise. The fp32 result is a few of its spacings from the exact one, of
    which 65536 fit between two bfloat16: about 1e-4 of the elements may go the other way, and with other noise 1/3 do.
    """
    uid = bucket.rounding().uids[i]
    noise = oracles.noise(SEED, uid, step, stream, np.arange(exact.size).reshape(exact.shape))
    expected = oracles.to_bf16_stochastic(np.float32(exact), noise)
    wrong = np.sum((actual.float().numpy() != expected)[finite])
    assert wrong <= 2 + exact.size / 1000, f"{wrong} of {exact.size} elements are rounded with other noise"


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_every_shape_and_dtype(verb, case, precision):
    bucket = make_bucket([case], precision, fresh=True)
    for step in range(4):
        set_gradients(bucket, [case], seed=100 + step)
        step_and_check(bucket, verb)


OPTIONS = {
    "no_decay": dict(weight_decay=0.0),
    "lr_tensor": dict(lr=torch.tensor(2.0**-6)),
    "lr_0": dict(lr=0.0),
    "eps_large": dict(eps=1e-3),
    "beta1_0": dict(betas=(0.0, 0.99)),
    "beta2_0": dict(betas=(0.9, 0.0)),
    "betas_0": dict(betas=(0.0, 0.0)),
    "betas_long": dict(betas=(0.99, 0.9999)),
}


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_hyperparameters_and_counters_that_differ(verb, options, precision):
    if verb == "scaled_update":
        options = {k: v for k, v in options.items() if k in SCALED_UPDATE}
    bucket = make_bucket(FEW, precision)
    assert len({s.item() for s in bucket.steps}) == len(FEW)
    for step in range(3):
        set_gradients(bucket, FEW, seed=200 + 10 * step)
        step_and_check(bucket, verb, **options)


TRANSFORMS = {
    "inv_scale": dict(inv_scale=2.0**-16),
    "inv_scale_zero": dict(inv_scale=0.0),
    "clip_value": dict(clip_value=2.0**-10),
    "clip_coef": dict(clip_coef=0.3125),
    "maximize": dict(maximize=True),
    "all": dict(inv_scale=2.0**-3, clip_value=2.0**-13, clip_coef=0.5, maximize=True),
}


def make_transform(gradient, **others):
    tensors = {k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in gradient.items()}
    return GradTransform(**tensors, **others)


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("gradient", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_gradient_transforms(verb, gradient, precision):
    bucket = make_bucket(FEW, precision)
    for step in range(2):
        set_gradients(bucket, FEW, seed=300 + 10 * step)
        step_and_check(bucket, verb, make_transform(gradient), gradient)


def test_transforms_in_their_order():
    """Unscale, clip by value in unscaled units, then the norm coefficient: any other order gives another number."""
    p, g, step = torch.zeros(1), torch.tensor([96.0]), torch.tensor(0.0)
    transform = GradTransform(torch.tensor(0.125), clip_value=4.0, clip_coef=torch.tensor(0.5), maximize=True)
    reference.scaled_update_(
        [p], [g], [step], lr=1.0, weight_decay=0.0, shards=None, transform=transform, rounding=Rounding()
    )
    assert p.item() == 2.0


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("clip_value", [None, 0.5])
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_nonfinite_elements_keep_what_is_theirs(verb, clip_value, precision):
    bucket = make_bucket(FEW, precision)
    skipped = torch.tensor(7)
    for grad in bucket.grads[2:]:
        flat = [torch.unravel_index(torch.tensor(i), grad.shape) for i in (0, 5, 64, 65)]
        for index, bad in zip(flat, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
            grad[index] = bad
    bucket.grads[0].fill_(torch.inf)
    transform = GradTransform(clip_value=clip_value, skipped=skipped)
    before = bucket.copies()
    step_and_check(bucket, verb, transform, dict(clip_value=clip_value))
    assert skipped.item() == 7 + 1 + 4 * len(bucket.grads[2:])
    moved = [(a != b).sum().item() / a.numel() for a, b in zip(bucket.params[2:], before[0][2:], strict=True)]
    assert min(moved) > 0.4  # bfloat16 rounds small updates away, here at most half of them


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_overflow_inside_the_transform_is_skipped_too(verb):
    """A finite gradient that inv_scale or clip_coef makes infinite."""
    for gradient in (dict(inv_scale=2.0**100), dict(clip_coef=2.0**100)):
        bucket = make_bucket(FEW[2:3])
        bucket.grads[0][3, 4] = 2.0**60
        skipped = torch.tensor(0)
        before = bucket.copies()
        bucket.run(verb, lr=2.0**-110, transform=make_transform(gradient, skipped=skipped))
        assert skipped.item() == 1
        assert bucket.params[0][3, 4] == before[0][0][3, 4]
        assert bucket.params[0].isfinite().all()


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_nonfinite_elements_go_through_when_asked(verb):
    bucket = make_bucket(FEW[2:3])
    bucket.grads[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    skipped = torch.tensor(0)
    bucket.run(verb, transform=GradTransform(skip_nonfinite=False, skipped=skipped))
    assert skipped.item() == 0
    assert not bucket.params[0][0, :3].isfinite().any()
    assert bucket.params[0].isfinite().sum() == bucket.params[0].numel() - 3


@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_infinite_gradient_is_clipped_when_not_skipped(verb):
    bucket, same = make_bucket(FEW[2:3]), make_bucket(FEW[2:3])
    bucket.grads[0][1, :2] = torch.tensor([torch.inf, -torch.inf])
    same.grads[0][1, :2] = torch.tensor([0.25, -0.25])
    for b in (bucket, same):
        b.run(verb, transform=GradTransform(clip_value=0.25, skip_nonfinite=False))
    assert_same_bits(bucket.params[0], same.params[0])


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("verb", ["adamw", "scaled_update"])
def test_found_inf_leaves_everything(verb, precision):
    bucket, skipped = make_bucket(FEW, precision), torch.tensor(0)
    bucket.grads[2][0, 0] = torch.inf
    before = bucket.copies()
    bucket.run(verb, transform=GradTransform(found_inf=torch.tensor(1.0), skipped=skipped))
    for column, old in zip(bucket.columns(), before, strict=True):
        for a, b in zip(column, old, strict=True):
            assert_same_bits(a, b)
    assert skipped.item() == 0
    step_and_check(bucket, verb, GradTransform(found_inf=torch.tensor(0.0)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_parity_of_a_whole_run(weight_decay):
    """50 steps without going back to the stored state, against the project's calibrated bound for any such rule."""
    cases = [case for case in SHAPES if case.name in ("four_tiles", "transposed_param")]
    bucket = make_bucket(cases, fresh=True)
    start = bucket.copies()
    p, m, v = ([numpy64(t) for t in start[column]] for column in (0, 2, 3))
    for step in range(1, 51):
        set_gradients(bucket, cases, seed=10 * step)
        bucket.adamw(weight_decay=weight_decay)
        for i, grad in enumerate(bucket.grads):
            state = (p[i], numpy64(grad), m[i], v[i], step)
            p[i], m[i], v[i] = oracles.adamw(*state, **{**ADAMW, "weight_decay": weight_decay})
    for i, param in enumerate(bucket.params):
        assert_parity(param, torch.from_numpy(p[i]), start[0][i], 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_grad_stats(case, dtype):
    """Block sums in fp32 add up at most 2**16 positive terms, in pairs: 32 units of 2**-24 are ample."""
    grad = make_tensors(case, dtype, 3)[1]
    squares, _ = oracles.grad_stats([numpy64(grad)])
    result = grad_stats([grad])
    assert result.dtype is torch.float32
    assert result.shape == (2,)
    assert abs(result[0].item() - squares) <= 32 * 2.0**-24 * squares
    assert result[1].item() == 0


def test_grad_stats_of_many_and_of_bad_elements():
    grads = [make_tensors(case, torch.float32, i)[1] for i, case in enumerate(SHAPES)]
    squares, _ = oracles.grad_stats(map(numpy64, grads))
    assert abs(grad_stats(grads)[0].item() - squares) <= 32 * 2.0**-24 * squares
    grads[7][1, 2], grads[22][3, 4], grads[23][5, 6] = torch.nan, torch.inf, -torch.inf
    result = grad_stats(grads)
    assert not result[0].isfinite()
    assert result[1].item() == 3
    large = torch.full((4,), 2e19)
    assert grad_stats([large]).tolist() == [torch.inf, 0]


def test_cases_are_what_they_say():
    """Layouts survive, so that the tests above and the kernels' really see them."""
    by_name = {case.name: make_tensors(case, torch.bfloat16, 0) for case in SHAPES}
    assert len(by_name) == len(SHAPES)
    assert by_name["scalar"][0].ndim == 0
    assert by_name["transposed_param"][0].stride() == (1, 27)
    assert by_name["transposed_param"][1].is_contiguous()
    assert by_name["expanded_grad"][1].stride() == (1, 0)
    assert by_name["misaligned"][0].data_ptr() % 16 == 2
    assert by_name["conv_channels_last"][0].is_contiguous(memory_format=torch.channels_last)
    assert by_name["reversed_dims"][0].stride() == (1, 3, 15, 30, 90)
    assert all(p.numel() <= 1 << 16 for p, _ in by_name.values())
    assert Case("a", (2,)) == Case("a", (2,))
