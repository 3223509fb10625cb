"""Steps of whitening, and what they have to leave: of the reference and of the kernels alike."""

import numpy as np
import torch

import oracles
from buckets import SEED
from lowmem_kernels import GradTransform
from lowmem_kernels.testing import SHAPES, Precision, assert_rounded, assert_same_bits
from lowmem_kernels.testing.oracles import whitening as exact
from lowmem_kernels.whitening import WhiteningRule, whiten_

HYPER = dict(lr=2.0**-6, scale=0.25, weight_decay=0.125)
BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.float32, stochastic=True)
CASES = [case for case in SHAPES if len(case.shape) >= 2]
RULES = {
    "swan": dict(),
    "swan_converging": dict(beta=0.5),
    "multinorm": dict(normalize="row", beta=0.5, iterations=5),
    "muon": dict(normalize=None, solver="polynomial"),
    "swan_fast": dict(solver="polynomial"),
    "conv": dict(conv=True),
    "conv_row": dict(conv=True, normalize="row"),
    "one_step": dict(iterations=1),
}


def numpy64(tensor):
    return tensor.detach().double().numpy()


def exact_d(grad, rule, gradient=None):
    """(D, error of each element) of a parameter, from the oracle.

    The oracle estimates the error in norm. What was seen is up to 3.4 times as much. D is off by a product of it with
    a matrix of K x K, so a single element is off in proportion to the largest in its column (row, of a tall matrix):
    24 times as much, of that plus 1, is ample. 2**-19 is for the rounding of X and for sums.
    """
    g, _ = oracles.transformed(numpy64(grad), **(gradient or {}))
    if g.size == 0:
        return g, g
    conv = rule.get("conv", False)
    found = [exact.whitened(x, **{k: v for k, v in rule.items() if k != "conv"}) for x in exact.matrices(g, conv)]
    d = np.stack([d for d, _ in found])
    error = 24 * np.array([error + 2.0**-19 for _, error in found]).reshape(-1, 1, 1)
    largest = np.abs(d).max(1 if d.shape[1] < d.shape[2] else 2, keepdims=True)
    return d.reshape(g.shape), (error * (1 + largest + 0 * d)).reshape(g.shape)


def step_and_check(bucket, rule, transform=None, gradient=None, backend="torch", **options):
    """One step, and all it wrote against the oracle."""
    hyper = {**HYPER, **options}
    before = bucket.copies()
    whiten_(
        bucket.params, bucket.grads, bucket.steps, rule=WhiteningRule(**rule), rounding=bucket.rounding(),
        transform=transform or GradTransform(), backend=backend, **hyper,
    )  # fmt: skip
    hyper["lr"] = float(hyper["lr"])
    for i, param in enumerate(bucket.params):
        p, g, t = before[0][i], before[1][i], before[4][i].item() + 1
        label = f"param of {bucket.cases[i] if hasattr(bucket, 'cases') else i}"
        assert bucket.steps[i].item() == t
        assert_same_bits(bucket.grads[i], g, "grad is only read")
        d, error = exact_d(g, rule, gradient)
        result = exact.update(numpy64(p), d, **hyper)
        bound = hyper["lr"] * hyper["scale"] * error + 2.0**-22 * (np.abs(numpy64(p)) + np.abs(result - numpy64(p)))
        stochastic = bucket.precision.stochastic and param.dtype is torch.bfloat16
        assert_rounded(param, torch.from_numpy(result), torch.from_numpy(bound), stochastic=stochastic, name=label)
        if stochastic and error.size and error.max() < 2e-3:
            check_noise(bucket, i, int(t), result)


def check_noise(bucket, i, step, result):
    """Elements are rounded with the documented noise at their logical index. Errors of D of 1e-5, times lr scale, are
    1e-3 of the distance between two bfloat16 at 0.02: a few times as many go the other way; with other noise 1/3 do."""
    index = np.arange(result.size).reshape(result.shape)
    noise = oracles.noise(SEED, bucket.rounding().uids[i], step, 0, index)
    expected = oracles.to_bf16_stochastic(np.float32(result), noise)
    wrong = np.sum(bucket.params[i].float().numpy() != expected)
    assert wrong <= 2 + result.size / 100, f"{wrong} of {result.size} elements are rounded with other noise"
