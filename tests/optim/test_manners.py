"""What every torch optimizer does: closures, groups, names, hooks, gradients that are missing."""

import pytest
import torch
from torch import nn

from optim.every import both_dtypes, cases_with_lr, every_case
from optim.tensors import (
    SMALL,
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


@every_case
def test_closure_runs_with_grad_enabled_and_its_loss_is_returned(case):
    params, starts = make_params(names=SMALL), make_params(names=SMALL)
    optimizer = case.make(params)
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(sum((p**2).sum() for p in params))
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    for param, start in zip(params, starts, strict=True):
        assert torch.equal(param.grad, 2 * start)
    optimizer.step(closure)
    assert losses[1] < losses[0]
    assert optimizer.step() is None


@every_case
def test_step_is_invisible_to_autograd_and_bumps_versions(case):
    params = make_params(names=SMALL)
    optimizer = case.make(params)
    loss = sum((p**2).sum() for p in params)
    take_steps(optimizer, params, 1)
    assert all(p.is_leaf and p.requires_grad for p in params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both_dtypes
@every_case
def test_parameters_without_gradient_stay_and_get_no_state(case, dtype):
    params, starts = make_params(dtype), make_params(dtype)
    optimizer = case.make(params)
    set_gradients(params, 0)
    for param in params[::2]:
        param.grad = None
    optimizer.step()
    assert_same_bits(params[::2], starts[::2])
    assert set(optimizer.state) == set(params[1::2])


@every_case
def test_step_without_any_gradient_does_nothing(case):
    params = make_params()
    optimizer = case.make(params, skip_nonfinite="step")
    with Unchanged(optimizer):
        assert optimizer.step() is None
    assert optimizer.nonfinite_count() == 0


@every_case
def test_zero_grad(case):
    params = make_params(names=SMALL)
    optimizer = case.make(params)
    set_gradients(params, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@both_dtypes
@every_case
def test_two_groups_equal_two_optimizers(case, dtype):
    """With gradients in one group at a time, so that it holds for a norm over all gradients too."""
    params, others = make_params(dtype), make_params(dtype)
    together = case.make_groups(params)
    apart = [case.make(others[::2]), case.make(others[1::2], **case.other_options)]
    uids = [i for start in (0, 1) for i in range(start, len(params), 2)]
    for optimizer in apart:
        optimizer.init_state()
    for position, i in enumerate(uids):
        apart[i % 2].state[others[i]]["uid"] = position
    for step in range(4):
        for start, optimizer in enumerate(apart):
            set_gradients(params, step)
            set_gradients(others, step)
            for param in params[1 - start :: 2]:
                param.grad = None
            together.step()
            optimizer.step()
    assert_same_bits(params, others)
    assert_same_states(states_of(together, params)[1::2], states_of(apart[1], others)[1::2])


@both_dtypes
@every_case
def test_groups_added_later_equal_groups_given_at_once(case, dtype):
    params, others = make_params(dtype), make_params(dtype)
    at_once, later = case.make_groups(params), case.make(others[::2])
    group = {"params": others[1::2], **case.other_options, "note": "kept"}
    later.add_param_group(group)
    assert set(group) == {"params", "note", *case.other_options}
    assert later.param_groups[1]["note"] == "kept"
    assert {k: v for k, v in later.param_groups[1].items() if k not in ("params", "note")} == {
        k: v for k, v in at_once.param_groups[1].items() if k != "params"
    }
    take_steps(at_once, params, 3)
    take_steps(later, others, 3)
    assert_same_bits(params, others)


@every_case
def test_named_parameters_keep_their_names(case):
    named = make_named_params(names=SMALL)
    optimizer = case.make(iter(named.items()))
    assert optimizer.param_groups[0]["param_names"] == list(SMALL)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(SMALL)
    take_steps(optimizer, list(named.values()), 1)
    with Unchanged(optimizer), pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": make_params(names=("experts",))})


@every_case
def test_step_hooks_run_around_the_step(case):
    params, optimizer = trained(case)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(params[0].detach().clone()))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(params[0].detach().clone()))
    before = params[0].detach().clone()
    take_steps(optimizer, params, 1, first=4)
    assert_same_bits(seen, [before, params[0]])
    assert not torch.equal(*seen)


@both_dtypes
@every_case
def test_maximize_equals_negated_gradients(case, dtype):
    params, others = make_params(dtype), make_params(dtype)
    optimizer, other = case.make(params, maximize=True), case.make(others)
    for step in range(4):
        set_gradients(params, step)
        set_gradients(others, step)
        for param in others:
            param.grad = -param.grad
        optimizer.step()
        other.step()
    assert_same_bits(params, others)
    assert_same_states(states_of(optimizer, params), states_of(other, others))


@every_case
def test_frozen_and_thawed_parameters(case):
    """A parameter that stops getting gradients keeps its state and carries on from it."""
    params, optimizer = trained(case)
    before = states_of(optimizer, params)
    optimizer.zero_grad()
    set_gradients(params[:1], 4)
    optimizer.step()
    assert_same_states(states_of(optimizer, params)[1:], before[1:])
    take_steps(optimizer, params, 1, first=5)
    assert [optimizer.state[p]["step"].item() for p in params] == [6, 5, 5]


@cases_with_lr
def test_optimizing_lowers_a_quadratic(case):
    """200 steps on |p - target|²; every rule gets much nearer whatever its scale of steps is.

    Not from 0, where steps in units of the parameter would be short. Updates whose rows have mean zero leave row means.
    """
    target = torch.linspace(-1, 1, 24).view(4, 6)
    param = nn.Parameter(torch.full((4, 6), 0.5))
    optimizer = case.make([param], lr=0.02, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (param - target).square().sum().backward()
        optimizer.step()
    left = param.detach() - target
    if case.centres_rows:
        left -= left.mean(1, keepdim=True)
    assert left.norm() < 0.1 * target.norm()


@every_case
def test_a_compiled_model_trains_as_the_model_itself(case):
    """Dynamo traces the model, guards on its parameters and must see each update."""

    def losses(wrap):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        optimizer = case.make(model.named_parameters())
        wrapped, seen = wrap(model), []
        for _ in range(4):
            loss = wrapped(torch.ones(2, 5)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    plain = losses(lambda model: model)
    assert plain[0] != plain[-1]
    assert losses(lambda model: torch.compile(model, backend="eager")) == plain
