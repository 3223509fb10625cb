"""MNGD with "spectral" among its norms, against its literal meaning: singular values made equal by an SVD."""

import numpy as np
import pytest
import torch
from torch import nn

from lowmem_kernels.testing.oracles.multinorm import multi_norm
from lowmem_kernels.testing.oracles.whitening import BACKWARD
from lowmem_optim import MNGD, SWAN, spectral
from optim.every import both_dtypes
from optim.tensors import assert_same_bits, assert_same_states, copies, make_params, states_of, take_steps, values

#: norms and iterations
SEQUENCES = [
    (("spectral",), 1),
    (("row", "spectral"), 1),
    (("row", "col", "spectral"), 1),
    (("col", "spectral"), 1),
    (("spectral", "row"), 1),
    (("spectral", "col"), 1),
    (("frobenius", "spectral", "frobenius"), 1),
    (("row", "spectral"), 2),
    (("col", "spectral", "row"), 2),
    (("spectral", "row", "col"), 2),
    (("sign", "spectral"), 1),
]
each_sequence = pytest.mark.parametrize(
    ("norms", "iterations"), SEQUENCES, ids=["-".join(norms) + f"-{count}" for norms, count in SEQUENCES]
)
SIGN_LAST = (("spectral", "sign"), 1)
each_sequence_and_sign = pytest.mark.parametrize(
    ("norms", "iterations"),
    [*SEQUENCES, SIGN_LAST],
    ids=["-".join(norms) + f"-{count}" for norms, count in [*SEQUENCES, SIGN_LAST]],
)
bad_values = pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])


def conditioned(*shape, seed=0):
    """Matrices whose singular values are in [0.5, 1], with rows of several sizes."""
    u, _, v = torch.linalg.svd(values(*shape, seed=seed), full_matrices=False)
    rows = torch.linspace(0.5, 2, shape[-2])[:, None]
    return rows * (u * torch.linspace(0.5, 1, u.shape[-1])) @ v


def literal(x, norms, iterations):
    """(X, how far fp32 arithmetic may be from it, relative in Frobenius norm) of one matrix, in float64.

    A "spectral" turns an error E |S| of the Gram matrix S into E |S| / (2 s²), for the smallest singular value s. A
    norm of lines, too, is as many roundings away as E allows, and may double what was wrong before.
    """
    error = 0.0
    for norm in norms * iterations:
        if norm == "spectral":
            s = np.linalg.svd(x, compute_uv=False)
            error = 2 * error + BACKWARD * np.sqrt(np.sum(s**4)) / (2 * s[-1] ** 2)
        else:
            error = 2 * error + BACKWARD
        x = multi_norm(x, {"norms": (norm,), "iterations": 1, "beta": None, "eps": None})
    return x, error


def update(grad, **options):
    """X: how far a matrix of zeros moves at lr and scale 1."""
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    MNGD([param], lr=1.0, scale=1.0, **options).step()
    return -param.detach()


def assert_near(actual, expected, error):
    actual = actual.double().numpy()
    assert np.linalg.norm(actual - expected) <= error * np.linalg.norm(expected)
    assert abs(np.sqrt((actual**2).mean()) - 1) <= error


@each_sequence
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)], ids=str)
def test_update_is_what_an_svd_makes_of_it(shape, norms, iterations):
    grad = conditioned(*shape)
    expected, error = literal(grad.double().numpy(), norms, iterations)
    assert error < 1e-3
    assert_near(update(grad, norms=norms, iterations=iterations, solver_iterations=14), expected, error)


@each_sequence
def test_bfloat16_is_the_same_rounded_once(norms, iterations):
    grad = conditioned(16, 24).bfloat16()
    expected, error = literal(grad.double().numpy(), norms, iterations)
    actual = update(grad, norms=norms, iterations=iterations, solver_iterations=14, stochastic_rounding=False)
    off = np.abs(actual.double().numpy() - expected)
    assert (off <= 2.0**-8 * np.abs(expected) + error * np.sqrt(expected.size)).all()


@each_sequence
def test_experts_and_convolutions(norms, iterations):
    options = {"norms": norms, "iterations": iterations, "solver_iterations": 14}
    stack = conditioned(3, 8, 10)
    actual = update(stack, stacks="batched", **options)
    for matrix, grad in zip(actual, stack, strict=True):
        assert_near(matrix, *literal(grad.double().numpy(), norms, iterations))
    conv = conditioned(6, 36)
    actual = update(conv.view(6, 4, 3, 3), stacks="conv", **options)
    assert_near(actual.view(6, 36), *literal(conv.double().numpy(), norms, iterations))


def test_sign_of_what_is_whitened():
    grad = conditioned(16, 24)
    expected, _ = literal(grad.double().numpy(), ("spectral",), 1)
    actual = update(grad, norms=SIGN_LAST[0], iterations=1, solver_iterations=14).numpy()
    clear = np.abs(expected) > 1e-4
    assert clear.mean() > 0.99
    assert (actual == np.sign(expected))[clear].all()


@both_dtypes
@pytest.mark.parametrize("stacks", [None, "batched", "conv"])
@pytest.mark.parametrize("options", [{"beta": 0.5}, {"beta": 0.8}, {"solver": "polynomial"}], ids=str)
def test_rows_then_spectral_once_is_swan_without_centring(dtype, stacks, options):
    params, others = make_params(dtype), make_params(dtype)
    shared = {"stacks": stacks, "weight_decay": 0.1, **options}
    first = MNGD(params, norms=("row", "spectral"), iterations=1, solver_iterations=7, **shared)
    second = SWAN(others, center=False, iterations=7, **shared)
    take_steps(first, params, 3)
    take_steps(second, others, 3)
    assert_same_bits(params, others)
    assert_same_states(states_of(first, params), states_of(second, others))


@both_dtypes
@each_sequence_and_sign
def test_maximize_goes_the_other_way(norms, iterations, dtype):
    """Once, however often there is a "spectral"."""
    grad = conditioned(8, 12).to(dtype)
    options = {"norms": norms, "iterations": iterations, "stochastic_rounding": False}
    up = update(grad, maximize=True, **options)
    assert_same_bits([up], [update(-grad, **options)])
    assert (up * update(grad, **options)).mean() < -0.9


@pytest.mark.parametrize("exponent", [-30, 30])
@each_sequence_and_sign
def test_a_scale_of_the_gradient_changes_no_bit(norms, iterations, exponent):
    grad = conditioned(8, 12)
    options = {"norms": norms, "iterations": iterations}
    assert_same_bits([update(grad * 2.0**exponent, **options)], [update(grad, **options)])


@each_sequence_and_sign
def test_rows_of_zeros_stay_where_they_are(norms, iterations):
    """And a gradient of zeros moves nothing."""
    grad = conditioned(8, 12)
    grad[3] = 0
    still = (update(grad, norms=norms, iterations=iterations) == 0).all(1)
    assert still.nonzero().flatten().tolist() == [3]
    assert (update(torch.zeros(8, 12), norms=norms, iterations=iterations) == 0).all()


def three(norms, iterations, **options):
    """(parameters, their values, optimizer) of stacks with gradients."""
    params = [nn.Parameter(values(3, 6, 8, seed=i)) for i in range(3)]
    for i, param in enumerate(params):
        param.grad = conditioned(3, 6, 8, seed=10 + i)
    return params, copies(params), MNGD(params, norms=norms, iterations=iterations, **options)


@bad_values
@pytest.mark.parametrize("stacks", ["batched", "conv"])
@each_sequence_and_sign
def test_a_bad_element_keeps_its_parameter_and_its_step(norms, iterations, stacks, bad):
    """All matrices of a stack, also where a norm of rows, columns or elements comes last. It is counted once."""
    params, starts, optimizer = three(norms, iterations, stacks=stacks, weight_decay=0.1)
    params[1].grad[2, 3, 4] = bad
    optimizer.step()
    assert_same_bits(params[1:2], starts[1:2])
    assert not any(torch.equal(params[i], starts[i]) for i in (0, 2))
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 0, 1]
    assert optimizer.nonfinite_count() == 1
    # and the others are where they would be otherwise
    clean, _, other = three(norms, iterations, stacks=stacks, weight_decay=0.1)
    other.step()
    assert_same_bits([params[0], params[2]], [clean[0], clean[2]])


@bad_values
@each_sequence_and_sign
def test_a_step_that_is_skipped_changes_nothing(norms, iterations, bad):
    params, starts, optimizer = three(norms, iterations, stacks="batched", skip_nonfinite="step")
    params[1].grad[2, 3, 4] = bad
    optimizer.step()
    assert_same_bits(params, starts)
    assert all(optimizer.state[p]["step"] == 0 for p in params)
    assert optimizer.nonfinite_count() == 1


@each_sequence_and_sign
def test_an_overflow_of_the_scaler_changes_nothing_and_is_not_counted(norms, iterations):
    params, starts, optimizer = three(norms, iterations, stacks="batched")
    params[1].grad[2, 3, 4] = float("inf")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert_same_bits(params, starts)
    assert all(optimizer.state[p]["step"] == 0 for p in params)
    assert optimizer.nonfinite_count() == 0


@each_sequence_and_sign
def test_false_lets_nan_reach_the_parameter(norms, iterations):
    params, _, optimizer = three(norms, iterations, stacks="batched", skip_nonfinite=False)
    params[1].grad[2, 3, 4] = float("nan")
    optimizer.step()
    assert params[1][2].isnan().all()
    assert params[1][0].isfinite().all()
    assert all(optimizer.state[p]["step"] == 1 for p in params)
    assert optimizer.nonfinite_count() == 0


@pytest.mark.parametrize("norms", [("col", "spectral"), ("spectral", "row"), ("col", "spectral", "row", "spectral")])
def test_parts_change_no_bit_and_bound_what_is_allocated(norms, monkeypatch):
    """Matrices in the place of gradients are made for at most AT_A_TIME elements, or for one parameter."""
    sizes, made = [], {name: getattr(spectral, name) for name in ("whitened", "_normalized")}
    for name, make in made.items():

        def measured(grads, *args, make=make, **options):
            sizes.append([grad.numel() for grad in grads])
            return make(grads, *args, **options)

        monkeypatch.setattr(spectral, name, measured)
    results = []
    for at_a_time, expected in ((1 << 25, [240, 400, 96, 240, 96]), (500, [240]), (640, [240, 400])):
        monkeypatch.setattr(spectral, "AT_A_TIME", at_a_time)
        sizes.clear()
        shapes = [(12, 20), (20, 20), (8, 12), (20, 12), (12, 8)]
        params = [nn.Parameter(values(*shape, seed=i).bfloat16()) for i, shape in enumerate(shapes)]
        for i, param in enumerate(params):
            param.grad = conditioned(*param.shape, seed=20 + i).bfloat16()
        MNGD(params, norms=norms, iterations=1, seed=7).step()
        assert sizes[0] == expected
        assert all(sum(part) <= at_a_time for part in sizes)
        results.append(params)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_a_large_parameter_is_a_part_by_itself():
    params = [torch.empty(shape, device="meta") for shape in ((10, 10), (9000, 9000), (10, 10), (10, 10))]
    assert [*spectral._parts(params)] == [slice(0, 1), slice(1, 2), slice(2, 4)]
    assert [*spectral._parts(params[:1])] == [slice(0, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, r"^momentum is 0.9 and norms is \('row', 'spectral'\); allowed with 'spectral': 0"),
        ({"eps": 1e-8}, r"^eps is 1e-08 and norms is \('row', 'spectral'\); allowed with 'spectral': None"),
        ({"nesterov": True}, "^nesterov is True and momentum is 0; allowed: "),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MNGD(make_params(names=("matrix",)), norms=("row", "spectral"), **options)
