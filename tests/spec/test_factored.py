"""The factored reference against float64 NumPy, step by step: every stored value is the exact result rounded once.

Each step is compared from the state actually stored before it, so nothing accumulates and the bound is that of one
step's fp32 arithmetic, derived in factored_oracles.py, plus one rounding to the stored dtype.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import factored_oracles
import oracles
from buckets import FP32, SEED
from factored_buckets import DIALECTS, EPS32, NAMES, RULES, make_bucket, set_gradients
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import (
    PRECISIONS,
    SHAPES,
    Case,
    Precision,
    assert_parity,
    assert_rounded,
    assert_same_bits,
)

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
FEW = [
    case
    for case in SHAPES
    if case.name in ("scalar", "seven", "empty", "row", "column", "odd_matrix", "transposed_param", "experts")
]
STREAMS = {"params": 0, "exp_avgs": 1}


def numpy64(tensor):
    return None if tensor is None else tensor.detach().double().numpy().astype(np.float64)


def exact_step(verb, before, g, t, hyper, stored=None):
    """What the oracle writes for one parameter, and how far fp32 may be from it."""
    p, _, m, row, col, res_row, res_col = (numpy64(x) for x in before[:7])
    if verb == "confidence":
        state = (p, g, m, row, col, res_row, res_col)
        return [f(*state, **hyper, stored=stored) for f in (factored_oracles.came, factored_oracles.came_error)]
    state = (p, g, row, col, m, t)
    return [f(*state, **hyper) for f in (factored_oracles.factored, factored_oracles.factored_error)]


def step_and_check(bucket, dialect, transform=None, gradient=None, **options):
    """One step, and all it wrote against the oracle. ``gradient``: oracles.transformed's arguments."""
    verb, hyper = dialect[0], {**dialect[1], **options}
    before = bucket.copies()
    bucket.run(verb, transform=transform or GradTransform(), **hyper)
    hyper["lr"] = float(hyper["lr"])
    for i, param in enumerate(bucket.params):
        old = [column[i] for column in before]
        t = old[-1].item() + 1
        assert bucket.steps[i].item() == t
        assert_same_bits(bucket.grads[i], old[1], "grad is only read")
        if param.numel() == 0:
            exact, error = {}, {}
        else:
            g, _ = oracles.transformed(numpy64(old[1]), **(gradient or {}))
            rounded_m = bucket.exp_avgs[i].dtype is not torch.float32
            stored = numpy64(bucket.exp_avgs[i]) if rounded_m and verb == "confidence" else None
            exact, error = exact_step(verb, old, g, t, hyper, stored)
        for name, column, was in zip(NAMES[:-1], bucket.columns(), old, strict=False):
            if name == "grads" or was is None:
                continue
            label = f"{name} of {bucket.cases[i]}"
            if error.get(name) is None:
                assert_same_bits(column[i], was, label)  # not for this rule
                continue
            assert_rounded(
                *as_tensors(column[i], exact[name], error[name]), stochastic=stochastic(bucket, column[i]), name=label
            )
            if stochastic(bucket, column[i]):
                check_noise(bucket, i, int(t), STREAMS[name], column[i], exact[name])


def as_tensors(actual, *arrays):
    return actual, *(torch.from_numpy(np.asarray(a)) for a in arrays)


def stochastic(bucket, tensor):
    return bucket.precision.stochastic and tensor.dtype is torch.bfloat16


def check_noise(bucket, i, step, stream, actual, exact):
    """Elements are rounded with the documented noise. The fp32 result is a few of its spacings from the exact one, of
    which 65536 fit between two bfloat16: about 1e-4 of the elements may go the other way, and with other noise 1/3 do.
    """
    noise = oracles.noise(SEED, bucket.rounding().uids[i], step, stream, np.arange(exact.size).reshape(exact.shape))
    expected = oracles.to_bf16_stochastic(np.float32(exact), noise)
    wrong = np.sum(actual.float().numpy() != expected)
    assert wrong <= 2 + exact.size / 1000, f"{wrong} of {exact.size} elements are rounded with other noise"


#: The dtype of a state matters only where there is a momentum.
PRECISE = [(n, p) for n in DIALECTS for p in PRECISIONS if p.state is torch.float32 or n in ("external", "came")]


@pytest.mark.parametrize(("name", "precision"), PRECISE, ids=str)
def test_every_shape_and_dtype(name, precision):
    for fresh in (True, False):
        bucket = make_bucket(SHAPES, precision, fresh=fresh, verb=DIALECTS[name][0])
        step_and_check(bucket, DIALECTS[name])


def along_rows(grad, smallest, largest):
    """Rows, or elements below two dimensions, scaled from the smallest to the largest power of ten."""
    if grad.ndim == 0:
        return grad * 10.0**smallest
    if grad.ndim == 1:
        return grad * torch.logspace(smallest, largest, len(grad))
    return grad * torch.logspace(smallest, largest, grad.shape[-2])[:, None]


def dead_rows_and_columns(grad):
    """As an embedding's, most of whose tokens do not occur."""
    if grad.ndim:
        grad[..., ::2] = 0
    if grad.ndim >= 2:
        grad[..., 1::2, :] = 0
    return grad


def one_element(grad):
    only = torch.zeros_like(grad)
    only.view(-1)[-1:] = 1e-3
    return only


#: make_tensors' gradients are about 1e-3. "floor" spans 1e-5 .. 1e-8, where torch's floor binds part of V or all.
PATTERNS = {
    "heavy": lambda grad: grad * (grad / 1e-3) ** 2,
    "tiny": lambda grad: grad * 1e-12,
    "large": lambda grad: grad * 1e9,
    "zero": torch.zeros_like,
    "dead": dead_rows_and_columns,
    "one": one_element,
    "floor": lambda grad: along_rows(grad, -5, -2),
    "wide": lambda grad: along_rows(grad, -8, 4),
}

TORCH_SMALL_EPS = dict(RULES["torch"], rule=replace(RULES["torch"]["rule"], eps=(1e-30, 1e-3)))
HARD = {**DIALECTS, "torch_small_eps": ("factored", TORCH_SMALL_EPS)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", HARD)
def test_gradients_that_are_hard(name, pattern):
    """From zeros, with parameters of zero, where no rounding hides an error of the update, and in a run under way."""
    for precision, fresh in ((FP32, True), (FP32, False), (BF16_SR, False)):
        bucket = make_bucket(FEW, precision, seed=20, fresh=fresh, verb=HARD[name][0])
        if fresh:
            for param in bucket.params:
                param.zero_()
        for step in range(2 if fresh else 1):
            set_gradients(bucket, FEW, 400 + 10 * step, PATTERNS[pattern])
            step_and_check(bucket, HARD[name])


@pytest.mark.parametrize(("scale", "lowest", "highest"), [(1e-5, 0, 0.3), (3e-6, 0.1, 0.9), (1e-7, 1, 1), (1e-8, 1, 1)])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "under_way"])
def test_floor_of_the_torch_dialect(fresh, scale, lowest, highest):
    """Where the floor under mean(R) binds alone, with that under V for some elements, and with that for all."""
    cases = FEW[4:]
    bucket = make_bucket(cases, seed=50, fresh=fresh)
    for row, col in zip(bucket.rows, bucket.cols, strict=True):
        row.mul_((scale / 1e-3) ** 2)  # as such gradients would have left them
        col.mul_((scale / 1e-3) ** 2)
    for step in range(3):
        set_gradients(bucket, cases, 60 + step, lambda grad: grad * (scale / 1e-3))
        step_and_check(bucket, DIALECTS["torch"])
    factors = [[numpy64(f) for f in pair] for pair in zip(bucket.rows, bucket.cols, strict=True)]
    assert all((row.mean(-1) < EPS32).all() for row, _ in factors)
    bound = np.mean([np.mean(factored_oracles.estimate(*pair, EPS32) <= EPS32**2) for pair in factors])
    assert lowest <= bound <= highest, bound


def test_squares_close_to_nothing():
    """Gradients whose squares fp32 can hardly hold move parameters where eps1 allows it, as 1e-30 does."""
    cases = [case for case in FEW if case.name in ("row", "column", "odd_matrix", "experts")]
    bucket = make_bucket(cases, fresh=True)
    before = bucket.copies()
    for step in range(2):
        set_gradients(bucket, cases, 900 + step, lambda grad: grad * 1e-17)
        step_and_check(bucket, HARD["torch_small_eps"])
    for param, old in zip(bucket.params, before[0], strict=True):
        assert (param != old).float().mean() > 0.8


@pytest.mark.parametrize("t", [2, 10, 10**3, 10**6])
@pytest.mark.parametrize("name", DIALECTS)
def test_late_steps(name, t):
    """The weight t**-0.8 and the rate t**-0.5 at any t, when gradients of another scale come."""
    bucket = make_bucket(FEW, seed=30, verb=DIALECTS[name][0])
    for step in bucket.steps:
        step.fill_(t - 1)
    set_gradients(bucket, FEW, 500, lambda grad: grad * 30)
    step_and_check(bucket, DIALECTS[name])


VARIANTS = {
    "clip_half": (dict(clip_threshold=0.5), {}),
    "clip_none": (dict(clip_threshold=float("inf")), {}),
    "eps1_large": (dict(eps=(1e-6, 1e-3)), {}),
    "eps2_large": (dict(eps=(1e-30, 0.5)), {}),
    "decay_rate": (dict(decay_rate=-0.5), {}),
    "beta2": (dict(beta2=0.9), {}),
    "beta2_0": (dict(beta2=0.0), {}),
    "beta1_0": (dict(beta1=0.0), {}),
    "momentum_scaled": (dict(beta1=0.9, scale_parameter=True), {}),
    "warmup": (dict(lr_schedule="warmup"), dict(lr=1e-6)),
    "warmup_over": (dict(lr_schedule="warmup"), dict(lr=0.5)),
    "rsqrt_over": (dict(lr_schedule="rsqrt"), dict(lr=0.5)),
    "lr_decay_unscaled": (dict(scale_decay=False), dict(weight_decay=0.3)),
    "lr_0": ({}, dict(lr=0.0)),
    "lr_tensor": ({}, dict(lr=torch.tensor(2.0**-9))),
    "no_decay": ({}, dict(weight_decay=0.0)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["adalomo", "torch"])
def test_attributes_of_a_rule(name, variant):
    changes, options = VARIANTS[variant]
    if name == "torch" and "eps" in changes:
        changes = dict(eps=(changes["eps"][0] ** 0.5, changes["eps"][1]))
    rule = replace(RULES[name]["rule"], **changes)
    bucket = make_bucket(FEW, seed=70)
    assert len({step.item() for step in bucket.steps}) == len(FEW)
    for step in range(2):
        set_gradients(bucket, FEW, 600 + 10 * step)
        step_and_check(bucket, DIALECTS[name], rule=rule, **options)


CAME_VARIANTS = {
    "betas_short": dict(betas=(0.5, 0.9, 0.8)),
    "beta2_0": dict(betas=(0.9, 0.0, 0.999)),
    "beta3_0": dict(betas=(0.9, 0.99, 0.0)),
    "eps_large": dict(eps=(1e-6, 0.1)),
    "clip_half": dict(clip_threshold=0.5),
    "clip_none": dict(clip_threshold=float("inf")),
    "no_decay": dict(weight_decay=0.0),
    "decay": dict(weight_decay=10.0),
    "lr_0": dict(lr=0.0),
    "lr_tensor": dict(lr=torch.tensor(2.0**-9)),
}


@pytest.mark.parametrize("variant", CAME_VARIANTS)
def test_options_of_came(variant):
    bucket = make_bucket(FEW, seed=80, verb="confidence")
    for step in range(2):
        set_gradients(bucket, FEW, 700 + 10 * step)
        step_and_check(bucket, DIALECTS["came"], **CAME_VARIANTS[variant])


TRANSFORMS = {
    "inv_scale": dict(inv_scale=2.0**-16),
    "inv_scale_zero": dict(inv_scale=0.0),
    "clip_value": dict(clip_value=2.0**-10),
    "clip_coef": dict(clip_coef=0.3125),
    "maximize": dict(maximize=True),
    "all": dict(inv_scale=2.0**-3, clip_value=2.0**-13, clip_coef=0.5, maximize=True),
}


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("gradient", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["relative", "torch", "constant_beta2", "came"])
def test_gradient_transforms(name, gradient, precision):
    transform = GradTransform(
        **{k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in gradient.items()}
    )
    bucket = make_bucket(FEW, precision, seed=90, verb=DIALECTS[name][0])
    step_and_check(bucket, DIALECTS[name], transform, gradient)


#: More elements than a cache holds, so that an implementation cuts them: in rows, in matrices, inside of a row.
LARGE = [
    Case("many_rows", (1030, 140), "transposed", "transposed"),
    Case("many_matrices", (70, 50, 41), "contiguous", "transposed"),
    Case("long_rows", (2, 70001)),
    Case("long_vector", (140001,)),
]


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("name", ["external", "torch", "came"])
def test_large_tensors(name, case, precision):
    """Sums over parts, noise at the index of an element in the whole, and, at 2e-6, a floor that some elements feel."""
    bucket = make_bucket([case], precision, seed=60, verb=DIALECTS[name][0])
    for scale in (1.0, 2e-3):
        set_gradients(bucket, [case], 800, lambda grad, scale=scale: grad * scale)
        step_and_check(bucket, DIALECTS[name])


@pytest.mark.parametrize("name", DIALECTS)
def test_fp32_parity_of_a_whole_run(name):
    """50 steps without going back to the stored state, against the project's calibrated bound for any such rule."""
    verb, hyper = DIALECTS[name]
    cases = [case for case in SHAPES if case.name in ("seven", "four_tiles", "transposed_param", "experts")]
    bucket = make_bucket(cases, fresh=True, verb=verb)
    start = bucket.copies()
    states = [{n: numpy64(column[i]) for n, column in zip(NAMES, start, strict=True)} for i in range(len(cases))]
    for step in range(1, 51):
        set_gradients(bucket, cases, seed=10 * step)
        bucket.run(verb, **hyper)
        for state, grad in zip(states, bucket.grads, strict=True):
            p, g, row, col, m = state["params"], numpy64(grad), state["rows"], state["cols"], state["exp_avgs"]
            if verb == "confidence":
                residuals = (state["res_rows"], state["res_cols"])
                state.update(factored_oracles.came(p, g, m, row, col, *residuals, **hyper))
            else:
                state.update(factored_oracles.factored(p, g, row, col, m, step, **hyper))
    for i, (param, state) in enumerate(zip(bucket.params, states, strict=True)):
        assert_parity(param, torch.from_numpy(np.asarray(state["params"])), start[0][i], 50, cases[i].name)


def test_bounds_are_tight():
    """A bound that allows everything checks nothing: an update may be off by 1e-4 of the largest at most."""
    bucket = make_bucket(FEW, seed=40)
    for name, (verb, hyper) in DIALECTS.items():
        for i, param in enumerate(bucket.params):
            if param.numel():
                old = [column[i] for column in bucket.copies()]
                exact, error = exact_step(verb, [0 * param, *old[1:]], numpy64(old[1]), 5.0, hyper)
                for written, allowed in error.items():
                    if allowed is not None:
                        assert np.max(allowed) <= 1e-4 * np.max(np.abs(exact[written])), (name, written, i)
