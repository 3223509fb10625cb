"""torch.amp.GradScaler: the scale goes away inside the step, and an overflow skips all of it."""

import pytest
import torch

from optim.every import both_dtypes, every_case
from optim.tensors import (
    SMALL,
    Unchanged,
    assert_same_bits,
    assert_same_states,
    copies,
    gradient,
    make_params,
    set_gradients,
    states_of,
    take_steps,
)

SCALE = 2.0**10


def backward(scaler, params, step, spoil=False):
    """Gradients of ``sum(p * c)``, which are the c of `gradient` times the scale, exactly."""
    for param in params:
        param.grad = None
    weights = [gradient(p, step, i) for i, p in enumerate(params)]
    if spoil:
        weights[-1][-1, -1] = float("inf")
    loss = sum((p.float() * c.float()).sum() for p, c in zip(params, weights, strict=True))
    scaler.scale(loss).backward()
    assert torch.equal(params[0].grad, weights[0] * SCALE) or spoil


@pytest.mark.parametrize("unscale_first", [False, True], ids=["in-step", "unscale_"])
@both_dtypes
@every_case
def test_finite_steps_equal_steps_without_scaler(case, dtype, unscale_first):
    """A power of two changes no digit, so the bits are the same."""
    params, others = make_params(dtype, SMALL), make_params(dtype, SMALL)
    optimizer, plain = case.make(params), case.make(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(4):
        backward(scaler, params, step)
        for i, (param, other) in enumerate(zip(params, others, strict=True)):
            # in the layout that autograd chose, on which the order of the sums in a product of matrices depends
            other.grad = torch.empty_like(param.grad).copy_(gradient(param, step, i))
        if unscale_first:
            scaler.unscale_(optimizer)
            assert torch.equal(params[0].grad, others[0].grad)
        grads = copies(p.grad for p in params)
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits([p.grad for p in params], grads)
        plain.step()
    assert_same_bits(params, others)
    assert_same_states(states_of(optimizer, params), states_of(plain, others))


@pytest.mark.parametrize("skip_nonfinite", ["tensor", "step", False])
@pytest.mark.parametrize("unscale_first", [False, True], ids=["in-step", "unscale_"])
@both_dtypes
@every_case
def test_an_overflow_skips_the_whole_step(case, dtype, unscale_first, skip_nonfinite):
    """Parameters, states and step counters keep their bits, whatever skip_nonfinite says; then the scale is halved."""
    params = make_params(dtype, SMALL)
    optimizer = case.make_groups(params, skip_nonfinite=skip_nonfinite)
    take_steps(optimizer, params, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with Unchanged(optimizer):
        backward(scaler, params, 2, spoil=True)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert not hasattr(optimizer, "found_inf")
    before = copies(params)
    take_steps(optimizer, params, 1, first=2)
    assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


@every_case
def test_first_step_that_overflows_leaves_state_as_new(case):
    params, others = make_params(names=SMALL), make_params(names=SMALL)
    optimizer, new = case.make(params), case.make(others)
    new.init_state()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    backward(scaler, params, 0, spoil=True)
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(params, others)
    assert_same_states(states_of(optimizer, params), states_of(new, others))


@every_case
def test_disabled_scaler_is_an_ordinary_step(case):
    params, others = make_params(names=SMALL), make_params(names=SMALL)
    optimizer, plain = case.make(params), case.make(others)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_gradients(params, 0)
    scaler.step(optimizer)
    scaler.update()
    take_steps(plain, others, 1)
    assert_same_bits(params, others)
