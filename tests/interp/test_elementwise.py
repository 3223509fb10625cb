"""The elementwise kernels in Triton's interpreter against the torch reference.

Where both compute the same fp32 operations in the same order, bits are equal: scaled_update without decay is one
product and one difference on both sides. AdamW is not that: torch's lerp may fuse a product and a sum, the kernel takes
the bias corrections by another formula, and torch rounds lr * weight_decay once, the kernel each factor.
"""

import numpy as np
import pytest
import torch

import parity
from buckets import ADAMW, FP32, NAMES, SCALED_UPDATE, VARIED, assert_same_buckets, make_bucket, set_gradients
from lowmem_kernels import GradTransform
from lowmem_kernels.elementwise import grad_stats
from lowmem_kernels.testing import (
    DTYPES,
    PRECISIONS,
    SHAPES,
    Precision,
    assert_rounded,
    assert_same_bits,
    make_tensors,
)

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.float32, stochastic=True)
FEW = [case for case in SHAPES if case.name in ("scalar", "empty", "odd_matrix", "transposed_param", "misaligned")]
VERBS = ["adamw", "scaled_update"]


def both(cases, precision, verb, transform=None, steps=1, prepare=None, **options):
    """The same steps by the reference and by the kernels: (expected, actual)."""
    buckets = [make_bucket(cases, precision) for _ in range(2)]
    for bucket, backend in zip(buckets, ("torch", "triton"), strict=True):
        if prepare:
            prepare(bucket)
        for step in range(steps):
            if step:
                set_gradients(bucket, cases, seed=50 * step)
            bucket.run(verb, transform=transform or GradTransform(), backend=backend, **options)
    return buckets


def assert_close(actual, expected, start, steps):
    for name, column, other, old in zip(NAMES, actual.columns(), expected.columns(), start, strict=True):
        for i, tensors in enumerate(zip(column, other, old, strict=True)):
            parity.assert_close(*tensors, steps, f"{name}[{i}]")


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_adamw_equals_reference(case, precision):
    start = make_bucket([case], precision).copies()
    expected, actual = both([case], precision, "adamw")
    assert_close(actual, expected, start, 1)
    assert_same_bits(actual.steps[0], expected.steps[0])
    assert_same_bits(actual.grads[0], expected.grads[0])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_scaled_update_has_the_bits_of_the_reference(case, precision):
    """p - lr * g: one product, one difference, one rounding with the same noise."""
    expected, actual = both([case], precision, "scaled_update", weight_decay=0.0)
    assert_same_buckets(actual, expected)


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_mixed_layouts_in_one_call(verb, precision):
    """Three launches a step, three steps, decay included."""
    start = make_bucket(VARIED, precision).copies()
    expected, actual = both(VARIED, precision, verb, steps=3)
    assert_close(actual, expected, start, 3)


HYPER = {
    "lr_tensor": dict(lr=torch.tensor(2.0**-6)),
    "lr_0": dict(lr=0.0),
    "int_arguments": dict(lr=1, weight_decay=0, eps=1),
    "beta1_0": dict(betas=(0.0, 0.99)),
    "betas_long": dict(betas=(0.99, 0.9999)),
}


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("options", HYPER.values(), ids=HYPER)
@pytest.mark.parametrize("verb", VERBS)
def test_hyperparameters(verb, options, precision):
    options = {k: v for k, v in options.items() if k in (ADAMW if verb == "adamw" else SCALED_UPDATE)}
    start = make_bucket(FEW, precision).copies()
    expected, actual = both(FEW, precision, verb, steps=2, **options)
    assert_close(actual, expected, start, 2)


def test_beta2_0_forgets_a_large_past():
    """Without memory v is g² alone, however large v was: an update of sign(g), not one divided by what cancelled."""
    bucket = make_bucket(FEW[2:3])
    bucket.exp_avg_sqs[0].fill_(1e4)
    bucket.exp_avgs[0].zero_()
    bucket.adamw(betas=(0.9, 0.0), backend="triton")
    g = bucket.grads[0].double()
    assert_rounded(bucket.exp_avg_sqs[0], g * g, 2.0**-22 * g * g)


def test_beta1_0_forgets_a_large_past():
    bucket = make_bucket(FEW[2:3])
    bucket.exp_avgs[0].fill_(1e4)
    bucket.adamw(betas=(0.0, 0.99), backend="triton")
    assert_same_bits(bucket.exp_avgs[0], bucket.grads[0])


TRANSFORMS = {
    "inv_scale": dict(inv_scale=torch.tensor(2.0**-16)),
    "clip_value": dict(clip_value=2.0**-10),
    "clip_value_0": dict(clip_value=0.0),
    "clip_coef": dict(clip_coef=torch.tensor(0.3)),
    "maximize": dict(maximize=True),
    "all": dict(
        inv_scale=torch.tensor(0.3), clip_value=3e-4, clip_coef=torch.tensor(0.7), maximize=True, skip_nonfinite=False
    ),
}


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_have_the_bits_of_the_reference(transform, precision):
    """The transform is products and comparisons in one order, so bits survive it."""
    results = both(FEW, precision, "scaled_update", GradTransform(**transform), weight_decay=0.0)
    assert_same_buckets(*results)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_adamw_reads_the_same_transform(transform):
    start = make_bucket(FEW).copies()
    expected, actual = both(FEW, FP32, "adamw", GradTransform(**transform))
    assert_close(actual, expected, start, 1)


def spoil(bucket):
    """NaN and both infinities in the first block, at its end and in the last elements of every larger gradient."""
    bucket.grads[0].fill_(torch.inf)
    for grad in bucket.grads:
        for i, bad in ((0, torch.nan), (9, torch.inf), (grad.numel() - 1, -torch.inf), (grad.numel() - 2, torch.nan)):
            if grad.numel() > 100:
                grad[torch.unravel_index(torch.tensor(i), grad.shape)] = bad


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("clip_value", [None, 0.5])
@pytest.mark.parametrize("verb", VERBS)
def test_nonfinite_elements_are_kept_and_counted(verb, clip_value, precision):
    counts = [torch.tensor(5) for _ in range(2)]
    buckets = [make_bucket(FEW, precision) for _ in range(2)]
    start = buckets[0].copies()
    for bucket, backend, skipped in zip(buckets, ("torch", "triton"), counts, strict=True):
        spoil(bucket)
        with np.errstate(invalid="ignore"):  # the interpreter computes in NumPy, which warns of what is selected away
            bucket.run(verb, transform=GradTransform(clip_value=clip_value, skipped=skipped), backend=backend)
    expected, actual = buckets
    assert counts[0].item() == counts[1].item() == 5 + 1 + 4 * 3
    for name, column, old in zip(NAMES, actual.columns(), start, strict=True):
        for a, grad, s in zip(column, actual.grads, old, strict=True):
            if name not in ("grads", "steps"):
                assert a.isfinite().all()
                assert_same_bits(a[~grad.isfinite()], s[~grad.isfinite()])
    actual.grads = expected.grads = [torch.zeros(0)] * len(FEW)  # NaN differs from NaN
    start[1] = actual.grads
    assert_close(actual, expected, start, 1)


@pytest.mark.parametrize("verb", VERBS)
def test_nonfinite_elements_go_through_when_asked(verb):
    transform = GradTransform(skip_nonfinite=False, skipped=torch.tensor(0))
    with np.errstate(invalid="ignore"):
        expected, actual = both(FEW, FP32, verb, transform, prepare=spoil)
    for a, e in zip(actual.params, expected.params, strict=True):
        assert_same_bits(a.isfinite(), e.isfinite())
    assert transform.skipped.item() == 0
    assert [a.isfinite().sum().item() for a in actual.params] == [max(0, g.numel() - 4) for g in actual.grads]


@pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_found_inf_leaves_everything(verb, precision):
    transform = GradTransform(found_inf=torch.tensor(1.0), skipped=torch.tensor(3))
    untouched = make_bucket(FEW, precision)
    spoil(untouched)
    _, actual = both(FEW, precision, verb, transform, prepare=spoil, steps=1)
    assert_same_buckets(actual, untouched)
    assert transform.skipped.item() == 3
    results = both(FEW, precision, "scaled_update", GradTransform(found_inf=torch.tensor(0.0)), weight_decay=0.0)
    assert_same_buckets(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_grad_stats(case, dtype):
    """Sums of positive fp32 terms in another order: 32 units of 2**-24 are ample for sums in pairs."""
    grad = make_tensors(case, dtype, 3)[1]
    result = grad_stats([grad], backend="triton")
    squares = grad.double().square().sum().item()
    assert abs(result[0].item() - squares) <= 32 * 2.0**-24 * squares
    assert result[1].item() == 0
    assert result.shape == (2,)


def test_grad_stats_of_all_layouts_and_of_bad_elements():
    grads = [make_tensors(case, torch.bfloat16, i)[1] for i, case in enumerate(SHAPES)]
    squares = sum(g.double().square().sum().item() for g in grads)
    result = grad_stats(grads, backend="triton")
    assert abs(result[0].item() - squares) <= 32 * 2.0**-24 * squares
    for i, bad in ((0, torch.nan), (6, torch.inf), (22, -torch.inf), (25, torch.nan)):
        grads[i][torch.unravel_index(torch.tensor(grads[i].numel() - 1), grads[i].shape)] = bad
    result = grad_stats(grads, backend="triton")
    assert not result[0].isfinite()
    assert result[1].item() == 4
    assert_same_bits(grad_stats(grads, backend="triton"), result)
