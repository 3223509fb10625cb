"""Saving and loading: a resumed run has the bits of one that never stopped, and a bad checkpoint changes nothing."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from optim.every import both_dtypes, every_case, stateful_cases
from optim.tensors import (
    SMALL,
    Unchanged,
    assert_same_bits,
    assert_same_states,
    assert_same_values,
    copies,
    make_named_params,
    make_params,
    states_of,
    take_steps,
    trained,
)

#: what a resumed optimizer is constructed with, to show that the checkpoint's options win
OTHER = {"lr": 0.5, "weight_decay": 0.7, "seed": 99, "maximize": True, "skip_nonfinite": False}


def saved(optimizer):
    """The state dict after a trip through a file, read as untrusted data."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def parameters_like(params):
    return [nn.Parameter(p) for p in copies(params)]


@both_dtypes
@every_case
def test_resuming_equals_not_stopping(case, dtype):
    """All layouts, two groups, and an optimizer that was constructed with other options and another seed."""
    params = make_params(dtype)
    optimizer = case.make_groups(params, seed=-3)
    take_steps(optimizer, params, 4)
    again = parameters_like(params)
    other = {key: value for key, value in OTHER.items() if key != "lr" or case.options["lr"] is not None}
    resumed = case.make([{"params": again[::2]}, {"params": again[1::2]}], **other)
    resumed.load_state_dict(saved(optimizer))
    take_steps(optimizer, params, 4, first=4)
    take_steps(resumed, again, 4, first=4)
    assert_same_bits(again, params)
    assert_same_states(states_of(resumed, again), states_of(optimizer, params))
    assert_same_values(resumed.state_dict()["param_groups"][0]["lr"], case.options["lr"])


@pytest.mark.parametrize("names", ["saved", "loading"])
@every_case
def test_checkpoints_of_named_parameters_fit_unnamed_ones(case, names):
    """The rounding noise belongs to the saved uid, so the bits do not depend on who has names."""
    params = list(make_named_params(torch.bfloat16, SMALL).items())
    optimizer = case.make(params if names == "saved" else [p for _, p in params])
    params = [p for _, p in params]
    take_steps(optimizer, params, 3)
    again = parameters_like(params)
    resumed = case.make(again if names == "saved" else list(zip(SMALL, again, strict=True)))
    resumed.load_state_dict(saved(optimizer))
    take_steps(optimizer, params, 3, first=3)
    take_steps(resumed, again, 3, first=3)
    assert_same_bits(again, params)


@every_case
def test_loading_replaces_state_and_copies_it(case):
    params, optimizer = trained(case)
    checkpoint = optimizer.state_dict()
    again = parameters_like(params)
    resumed = case.make(again)
    take_steps(resumed, again, 1)
    resumed.load_state_dict(checkpoint)
    assert_same_states(states_of(resumed, again), states_of(optimizer, params))
    with Unchanged(optimizer):
        take_steps(resumed, again, 1)


@stateful_cases
def test_loading_never_casts_down(case):
    """bfloat16 parameters, float32 state; also where the optimizer would itself keep bfloat16 state."""
    params, optimizer = trained(case, torch.bfloat16)
    checkpoint = saved(optimizer)
    for param, state in zip(params, checkpoint["state"].values(), strict=True):
        for key in case.state_keys(param):
            state[key] = torch.full_like(state[key], 1 + 2**-20, dtype=torch.float32)
    optimizer.load_state_dict(checkpoint)
    for param in params:
        for key in case.state_keys(param):
            assert optimizer.state[param][key].dtype is torch.float32
            assert (optimizer.state[param][key] == 1 + 2**-20).all()
    take_steps(optimizer, params, 1, first=4)
    assert all(optimizer.state[p][key].dtype is torch.float32 for p in params for key in case.state_keys(p))


@stateful_cases
def test_loading_widens_to_what_a_new_state_would_be(case):
    params, optimizer = trained(case, torch.float32)
    checkpoint = saved(optimizer)
    for param, state in zip(params, checkpoint["state"].values(), strict=True):
        keys = case.state_keys(param)
        state.update({key: state[key].double() if key == keys[0] else state[key].bfloat16() for key in keys})
    optimizer.load_state_dict(checkpoint)
    assert all(optimizer.state[p][key].dtype is torch.float32 for p in params for key in case.state_keys(p))


@every_case
def test_missing_options_keep_the_values_of_the_constructor(case):
    """As in a checkpoint of an older version, which did not have the option."""
    _, optimizer = trained(case, seed=3)
    checkpoint = saved(optimizer)
    for group in checkpoint["param_groups"]:
        del group["seed"], group["skip_nonfinite"]
    again = make_params(names=SMALL)
    resumed = case.make(again, seed=7, skip_nonfinite="step")
    resumed.load_state_dict(checkpoint)
    assert resumed.param_groups[0]["seed"] == 7
    assert resumed.param_groups[0]["skip_nonfinite"] == "step"
    take_steps(resumed, again, 1, first=4)


@every_case
def test_parameters_without_saved_state_start_anew(case):
    params = make_params(names=SMALL)
    optimizer = case.make(params)
    take_steps(optimizer, params[:1], 3)
    resumed = case.make(params)
    resumed.load_state_dict(saved(optimizer))
    assert set(resumed.state) == set(params[:1])
    take_steps(resumed, params, 1, first=3)
    assert [resumed.state[p]["step"].item() for p in params] == [4, 1, 1]


def extra_key(checkpoint):
    checkpoint["state"][1]["momentum_buffer"] = torch.zeros(12, 20)


def no_step(checkpoint):
    del checkpoint["state"][1]["step"]


def one_group_more(checkpoint):
    checkpoint["param_groups"].append(copy.deepcopy(checkpoint["param_groups"][0]))


def one_parameter_less(checkpoint):
    checkpoint["param_groups"][0]["params"].pop()


def wrong_option(checkpoint):
    checkpoint["param_groups"][0]["weight_decay"] = -1.0


def unknown_choice(checkpoint):
    checkpoint["param_groups"][0]["skip_nonfinite"] = "element"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (extra_key, r"parameter 'matrix' has keys .*momentum_buffer.*allowed"),
        (no_step, r"parameter 'matrix' has keys .*allowed: .*'step'"),
        (one_group_more, "number of parameter groups"),
        (one_parameter_less, "doesn't match the size"),
        (wrong_option, "weight_decay is -1.0; allowed"),
        (unknown_choice, "skip_nonfinite is 'element'; allowed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@every_case
def test_bad_checkpoints_raise_and_change_nothing(case, spoil, message):
    params = make_named_params(names=SMALL)
    optimizer = case.make(list(params.items()))
    take_steps(optimizer, list(params.values()), 3)
    checkpoint = saved(optimizer)
    take_steps(optimizer, list(params.values()), 1, first=3)
    spoil(checkpoint)
    checkpoint["param_groups"][0]["lr"] = 0.123
    with Unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)


def wrong_shape(value):
    return torch.zeros(*value.shape, 2)


def integers(value):
    return value.to(torch.int64)


def python_number(value):
    return 0.5


@pytest.mark.parametrize("spoil", [wrong_shape, integers, python_number])
@stateful_cases
def test_states_that_do_not_fit_raise_and_change_nothing(case, spoil):
    """The last parameter's state is spoiled, when those before it could already be loaded; names and positions."""
    for named in (False, True):
        params = make_named_params(names=SMALL)
        optimizer = case.make(list(params.items()) if named else list(params.values()))
        take_steps(optimizer, list(params.values()), 3)
        for key in case.state_keys(params["transposed"]):
            checkpoint = saved(optimizer)
            take_steps(optimizer, list(params.values()), 1, first=3)
            checkpoint["state"][2][key] = spoil(checkpoint["state"][2][key])
            last = "'transposed'" if named else "2"
            with Unchanged(optimizer), pytest.raises(ValueError, match=rf"{key} of parameter {last} is .*; allowed: "):
                optimizer.load_state_dict(checkpoint)
            del checkpoint["state"][2][key]
            with (
                Unchanged(optimizer),
                pytest.raises(ValueError, match=rf"parameter {last} has keys .*allowed: .*{key}"),
            ):
                optimizer.load_state_dict(checkpoint)


@every_case
def test_hooks_of_the_user_run_in_order_and_see_everything(case):
    params, optimizer = trained(case)
    expected = states_of(optimizer, params)
    checkpoint = saved(optimizer)
    resumed = case.make(parameters_like(params))
    calls = []

    def first_pre(opt, incoming):
        calls.append("first pre")
        assert len(incoming["state"]) == len(params)
        return {**incoming, "param_groups": [{**g, "note": "first"} for g in incoming["param_groups"]]}

    def second_pre(opt, incoming):
        calls.append("second pre")
        assert incoming["param_groups"][0]["note"] == "first"

    def first_post(opt):
        calls.append("first post")
        assert_same_states(states_of(opt, opt.param_groups[0]["params"]), expected)

    resumed.register_load_state_dict_pre_hook(first_pre)
    resumed.register_load_state_dict_pre_hook(second_pre)
    resumed.register_load_state_dict_post_hook(first_post)
    resumed.register_load_state_dict_post_hook(lambda opt: calls.append("second post"))
    for _ in range(2):
        calls.clear()
        resumed.load_state_dict(checkpoint)
        assert calls == ["first pre", "second pre", "first post", "second post"]
        assert resumed.param_groups[0]["note"] == "first"


@every_case
def test_hooks_of_the_user_on_saving(case):
    _, optimizer = trained(case)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": len(state["state"])})
    assert optimizer.state_dict()["note"] == 3
    assert calls == ["pre"]


@every_case
def test_loading_leaves_the_checkpoint_as_it_is(case):
    params, optimizer = trained(case)
    checkpoint = saved(optimizer)
    before = copy.deepcopy(checkpoint)
    optimizer.load_state_dict(checkpoint)
    take_steps(optimizer, params, 2)
    assert_same_values(checkpoint, before)
    assert all(isinstance(v, (Tensor, int)) for state in checkpoint["state"].values() for v in state.values())
