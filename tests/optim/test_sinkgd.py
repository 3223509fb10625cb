"""What is said of SinkGD and MNGD beyond their oracle: what they are invariant to, and which known rules they are."""

import numpy as np
import pytest
import torch
from torch import nn

from lowmem_kernels.testing.oracles.multinorm import multi_norm
from lowmem_optim import MNGD, SinkGD
from optim.every import both_dtypes
from optim.tensors import (
    assert_same_bits,
    assert_same_states,
    make_params,
    states_of,
    take_steps,
    values,
)


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"iterations": 1, "momentum": 0.9, "nesterov": True, "stacks": "batched"}])
def test_sinkgd_is_mngd_with_the_norms_of_rows_and_columns(dtype, options):
    params, others = make_params(dtype), make_params(dtype)
    first, second = SinkGD(params, **options), MNGD(others, norms=("row", "col"), **options)
    take_steps(first, params, 3)
    take_steps(second, others, 3)
    assert_same_bits(params, others)
    assert_same_states(states_of(first, params), states_of(second, others))
    assert first.defaults == second.defaults


def update(make, grad, **options):
    """X: how far a matrix of zeros moves at lr and scale 1."""
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    make([param], lr=1.0, scale=1.0, **options).step()
    return -param.detach()


@pytest.mark.parametrize(("iterations", "bound"), [(1, 0.5), (5, 1e-3)])
def test_columns_are_exact_and_the_whole_has_rms_1(iterations, bound):
    """The last norm holds exactly, and rows only nearly."""
    x = update(SinkGD, values(30, 20, seed=0), iterations=iterations)
    torch.testing.assert_close(x.square().mean(0).sqrt(), torch.ones(20))
    rows = x.square().mean(1).sqrt()
    assert 1e-5 < (rows - 1).abs().max() < bound


@pytest.mark.parametrize("norms", [("row", "col"), ("col", "row"), ("row",), ("col",), ("sign",), ("frobenius",)])
def test_rows_and_columns_of_zeros_stay_where_they_are(norms):
    grad = values(7, 9, seed=3)
    grad[2] = 0
    grad[:, 4] = 0
    x = update(MNGD, grad, norms=norms)
    assert (x[2] == 0).all()
    assert (x[:, 4] == 0).all()
    assert ((x != 0) == (grad != 0)).all()
    assert x.isfinite().all()
    assert (update(MNGD, torch.zeros(7, 9), norms=norms) == 0).all()


def test_one_norm_alone_is_a_known_rule():
    grad = values(7, 9, seed=3)
    row = update(MNGD, grad, norms=("row",), iterations=1)
    torch.testing.assert_close(row, grad / grad.square().mean(1, keepdim=True).sqrt())
    col = update(MNGD, grad, norms=("col",), iterations=1)
    torch.testing.assert_close(col, grad / grad.square().mean(0, keepdim=True).sqrt())
    frobenius = update(MNGD, grad, norms=("frobenius",), iterations=1)
    torch.testing.assert_close(frobenius, grad / grad.square().mean().sqrt())
    assert torch.equal(update(MNGD, grad, norms=("sign",), iterations=1), grad.sign())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_single_norm_of_rows_stops_the_row_of_a_bad_element_only(bad):
    param = nn.Parameter(torch.zeros(7, 9))
    optimizer = MNGD([param], norms=("row",), iterations=1)
    param.grad = values(7, 9, seed=3)
    param.grad[2, 4] = bad
    optimizer.step()
    moved = (param != 0).all(1)
    assert moved.tolist() == [True, True, False, True, True, True, True]
    assert (param[2] == 0).all()
    assert optimizer.nonfinite_count() == 9


@pytest.mark.parametrize("eps", [1e-6, 0.3, 50.0])
def test_eps_bounds_every_norm_as_ports_do(eps):
    """Also where it has an effect: rows of the gradient have norms about 1 and 1e-4."""
    grad = 0.3 * values(10, 12, seed=5)
    grad[::2] *= 1e-4
    expected = multi_norm(grad.double().numpy(), {"norms": ("row", "col"), "iterations": 3, "eps": eps})
    actual = update(SinkGD, grad, iterations=3, eps=eps).double().numpy()
    assert np.linalg.norm(actual - expected) <= 2e-6 * np.linalg.norm(expected)
    exact = update(SinkGD, grad, iterations=3).double().numpy()
    assert (np.linalg.norm(actual - exact) > 1e-3 * np.linalg.norm(exact)) == (eps > 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nesterov": True}, "^nesterov is True and momentum is 0; allowed: "),
        ({"momentum_after": True}, "^momentum_after is True and momentum is 0; allowed: "),
        ({"norms": ("row",), "eps": 1e-8}, "^eps is 1e-08 and norms is .*; allowed with eps: 'row' and 'col' in turns"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MNGD(make_params(names=("matrix",)), **options)
