"""What state there is, when it is made, and that copies of an optimizer carry on as it would."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lowmem_kernels.numerics import name_of
from optim.every import CASES, both_dtypes, cases_with_lr, every_case
from optim.tensors import (
    Unchanged,
    assert_same_bits,
    assert_same_states,
    make_named_params,
    make_params,
    set_gradients,
    states_of,
    take_steps,
    trained,
)

each_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name}-{name_of(dtype)}")
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (dtype is torch.float16 and case.refuses_float16)
    ],
)


def described(state):
    """{key: (shape, dtype)} of the tensors of a state."""
    return {key: (tuple(v.shape), v.dtype) for key, v in state.items() if isinstance(v, Tensor)}


def expected_state(case, param):
    return {"step": ((), torch.float32), **case.state(tuple(param.shape), param.dtype)}


@each_dtype
def test_state_has_its_keys_shapes_and_dtypes(case, dtype):
    params = make_params(dtype)
    optimizer = case.make(params)
    take_steps(optimizer, params, 2)
    for param in params:
        state = optimizer.state[param]
        assert described(state) == expected_state(case, param)
        assert type(state["uid"]) is int
        assert state["step"] == 2
        assert all(v.is_contiguous() for v in state.values() if isinstance(v, Tensor))


@every_case
def test_state_is_made_at_the_first_gradient(case):
    params = make_params()
    optimizer = case.make(params)
    assert not optimizer.state
    set_gradients(params[:2], 0)
    optimizer.step()
    assert set(optimizer.state) == set(params[:2])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@each_dtype
def test_init_state_makes_the_state_of_a_step(case, device, dtype):
    params = [nn.Parameter(p.detach().to(device)) for p in make_params(dtype)]
    optimizer = case.make(params)
    optimizer.init_state()
    for position, param in enumerate(params):
        state = optimizer.state[param]
        assert described(state) == expected_state(case, param)
        assert state["uid"] == position
        assert all(v.device.type == device for v in state.values() if isinstance(v, Tensor))


@every_case
def test_init_state_changes_no_bit_of_a_run(case):
    expected, plain = trained(case, torch.bfloat16)
    params = make_params(torch.bfloat16, ("vector", "matrix", "transposed"))
    optimizer = case.make(params)
    optimizer.init_state()
    take_steps(optimizer, params, 2)
    with Unchanged(optimizer):
        optimizer.init_state()
    take_steps(optimizer, params, 2, first=2)
    assert_same_bits(params, expected)
    assert_same_states(states_of(optimizer, params), states_of(plain, expected))


@every_case
def test_state_dict_holds_tensors_and_ints_only(case):
    _, optimizer = trained(case, torch.bfloat16)
    for state in optimizer.state_dict()["state"].values():
        assert {type(value) for value in state.values()} <= {Tensor, int}
    for group in optimizer.state_dict()["param_groups"]:
        plain = (float, int, bool, str, tuple, type(None), Tensor)
        assert all(isinstance(value, plain) for key, value in group.items() if key != "params")


@every_case
def test_names_give_uids_that_positions_do_not(case):
    named = make_named_params()
    optimizer = case.make(list(named.items()))
    other = case.make(list(reversed(named.items())))
    optimizer.init_state()
    other.init_state()
    uids = [optimizer.state[p]["uid"] for p in named.values()]
    assert uids == [other.state[p]["uid"] for p in named.values()]
    assert len(set(uids)) == len(uids)
    assert min(uids) > len(uids)


def copied(params, optimizer):
    return copy.deepcopy((params, optimizer))


def pickled(params, optimizer):
    return pickle.loads(pickle.dumps((params, optimizer)))


def saved_whole(params, optimizer):
    buffer = io.BytesIO()
    torch.save((params, optimizer), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, saved_whole])
@both_dtypes
@every_case
def test_copies_carry_on_alike_and_share_nothing(case, duplicate, dtype):
    params, optimizer = trained(case, dtype, seed=5)
    twins, twin = duplicate(params, optimizer)
    assert [id(p) for g in twin.param_groups for p in g["params"]] == [id(p) for p in twins]
    with Unchanged(optimizer):
        take_steps(twin, twins, 3, first=4)
    take_steps(optimizer, params, 3, first=4)
    assert_same_bits(twins, params)
    assert_same_states(states_of(twin, twins), states_of(optimizer, params))
    assert twin.nonfinite_count() == 0


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@both_dtypes
@cases_with_lr
def test_zero_gradients_with_lr_0_change_no_parameter_bit(case, tensor_lr, dtype):
    """How torch.distributed.checkpoint creates state. Weight decay and stochastic rounding are on, -0.0 is included."""
    params, starts = make_params(dtype), make_params(dtype)
    for p in (*params, *starts):
        p.data.view(-1) if p.numel() == 0 else p.data[(0,) * p.ndim].neg_().mul_(0.0)
    optimizer = case.make(params, lr=torch.tensor(0.0) if tensor_lr else 0.0, weight_decay=0.1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(params, starts)
    assert len(optimizer.state) == len(params)


@every_case
def test_state_stays_as_it_is_when_parameters_change_dtype(case):
    """model.bfloat16() in the middle of a run: state in float32 loses nothing, and steps go on."""
    params, optimizer = trained(case)
    before = states_of(optimizer, params)
    for param in params:
        param.data = param.data.bfloat16()
        param.grad = None
    assert_same_states(states_of(optimizer, params), before)
    starts = [p.detach().clone() for p in params]
    take_steps(optimizer, params, 1, first=4)
    for param, start, state in zip(params, starts, before, strict=True):
        assert param.dtype is torch.bfloat16
        assert not torch.equal(param, start)
        assert described(optimizer.state[param]) == described(state)
