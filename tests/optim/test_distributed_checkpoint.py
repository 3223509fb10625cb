"""torch.distributed.checkpoint's view of an optimizer, in one process and without a process group."""

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optim.every import both_dtypes, cases_with_lr, every_case
from optim.tensors import assert_same_bits, assert_same_states, copies, make_params, states_of, values


class Model(nn.Module):
    """A module with a parameter of each layout."""

    def __init__(self, dtype):
        super().__init__()
        self.weights = nn.ParameterList(make_params(dtype))

    def step(self, optimizer, step):
        for i, param in enumerate(self.parameters()):
            param.grad = values(*param.shape, seed=100 * step + i).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def resumed(case, model, optimizer, make, options=None):
    """A second model and optimizer, made by get_ and set_optimizer_state_dict, which call step() with lr = 0."""
    state = get_optimizer_state_dict(model, optimizer, options=options)
    twin = Model(model.weights[0].dtype)
    for param, value in zip(twin.parameters(), copies(model.parameters()), strict=True):
        param.data = value
    starts = copies(twin.parameters())
    other = make(twin)
    set_optimizer_state_dict(twin, other, state, options=options)
    assert_same_bits(list(twin.parameters()), starts)
    return twin, other


def assert_carries_on(case, dtype, make, options=None):
    model = Model(dtype)
    optimizer = make(model)
    for step in range(3):
        model.step(optimizer, step)
    twin, other = resumed(case, model, optimizer, make, options)
    for step in range(3, 6):
        model.step(optimizer, step)
        twin.step(other, step)
    params, others = list(model.parameters()), list(twin.parameters())
    assert_same_bits(others, params)
    assert_same_states(
        [dict(sorted(s.items())) for s in states_of(other, others)],
        [dict(sorted(s.items())) for s in states_of(optimizer, params)],
    )


@both_dtypes
@every_case
def test_round_trip_carries_on_alike(case, dtype):
    assert_carries_on(case, dtype, lambda model: case.make(model.parameters(), seed=8))


@both_dtypes
@every_case
def test_round_trip_of_named_parameters(case, dtype):
    assert_carries_on(case, dtype, lambda model: case.make(model.named_parameters(), seed=8))


@every_case
def test_round_trip_of_flattened_state(case):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    assert_carries_on(case, torch.bfloat16, lambda model: case.make(model.parameters()), options)


@cases_with_lr
def test_round_trip_of_two_groups_with_a_tensor_lr(case):
    def make(model):
        params = list(model.parameters())
        return case.make_groups(params, lr=torch.tensor(1e-2))

    assert_carries_on(case, torch.float32, make)
