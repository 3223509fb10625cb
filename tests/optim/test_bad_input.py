"""What is refused, with a message that names the argument, its value and what is allowed, and changes nothing."""

import re

import pytest
import torch
from torch import nn

from optim.every import CASES, every_case
from optim.tensors import SMALL, Unchanged, assert_same_bits, copies, make_params, set_gradients, take_steps, trained

#: refused by every optimizer; a TypeError where the type alone is wrong
WRONG = [
    ("lr", -1e-3),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", "1e-3"),
    ("lr", True),
    ("lr", None),
    ("lr", torch.zeros(2)),
    ("stochastic_rounding", "yes"),
    ("stochastic_rounding", 1),
    ("seed", 0.5),
    ("seed", None),
    ("maximize", "no"),
    ("maximize", None),
    ("capturable", 2),
    ("skip_nonfinite", True),
    ("skip_nonfinite", "element"),
    ("skip_nonfinite", None),
    ("backend", "cuda"),
    ("backend", None),
]

wrong_values = pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        pytest.param(case, name, value, id=f"{case.name}-{name}={value}")
        for case in CASES
        for name, value in [*WRONG, *case.wrong]
        if not (name == "lr" and value is None and case.options["lr"] is None)
    ],
)


def message_about(name, value):
    shown = f"a tensor of {value.numel()} elements" if isinstance(value, torch.Tensor) else repr(value)
    return (
        rf"^{name}(\[\d\])? is .*; allowed: "
        if isinstance(value, tuple)
        else rf"^{name} is {re.escape(shown)}; allowed: "
    )


@wrong_values
def test_wrong_values_are_refused_by_the_constructor(case, name, value):
    with pytest.raises((ValueError, TypeError), match=message_about(name, value)):
        case.make(make_params(names=SMALL), **{name: value})


@wrong_values
def test_wrong_values_in_a_group_are_refused_and_change_nothing(case, name, value):
    params, optimizer = trained(case)
    group = {"params": make_params(names=("experts",)), name: value}
    with Unchanged(optimizer), pytest.raises((ValueError, TypeError), match=message_about(name, value)):
        optimizer.add_param_group(group)
    take_steps(optimizer, params, 1, first=4)


@every_case
@pytest.mark.parametrize(
    ("misspelled", "meant"),
    [
        ("weight_decy", "weight_decay"),
        ("skip_non_finite", "skip_nonfinite"),
        ("stochastic_round", "stochastic_rounding"),
    ],
)
def test_misspelled_options_are_refused_with_a_suggestion(case, misspelled, meant):
    message = f"unknown option '{misspelled}'; did you mean '{meant}'?"
    with pytest.raises(TypeError, match=re.escape(message)):
        case.make(make_params(names=SMALL), **{misspelled: 0})
    _, optimizer = trained(case)
    with Unchanged(optimizer), pytest.raises(TypeError, match=re.escape(message)):
        optimizer.add_param_group({"params": make_params(names=("experts",)), misspelled: 0})


@every_case
def test_unknown_options_are_refused_with_a_list(case):
    with pytest.raises(TypeError, match=r"unknown option 'preconditioner'; allowed: .*backend.*lr.*weight_decay"):
        case.make(make_params(names=SMALL), preconditioner=0)


@every_case
def test_unknown_keys_of_groups_are_kept(case):
    """Trainers, Lightning and schedulers put their own into groups, which pass through a checkpoint too."""
    params = make_params(names=SMALL)
    keys = {"name": "body", "lr_scale": 0.5, "initial_lr": 1.0, "swa_lr": 0.1, "fused": None, "is_expert": True}
    optimizer = case.make([{"params": params, **keys}])
    take_steps(optimizer, params, 1)
    other = case.make(make_params(names=SMALL))
    other.load_state_dict(optimizer.state_dict())
    for group in (optimizer.param_groups[0], other.param_groups[0]):
        assert {key: group[key] for key in keys} == keys


def not_a_leaf():
    return torch.ones(2, requires_grad=True) * 2


REFUSED = {
    "float64": (lambda: nn.Parameter(torch.ones(2, dtype=torch.float64)), "a parameter is float64; allowed: float32"),
    "complex64": (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), "a parameter is complex64; allowed: "),
    "int32": (lambda: torch.ones(2, dtype=torch.int32), "a parameter is int32; allowed: float32, bfloat16, float16"),
    "non-leaf": (not_a_leaf, "non-leaf"),
    "number": (lambda: 1.0, "can only optimize Tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
@every_case
def test_refused_parameters_change_nothing(case, name):
    """Even where the refused one is the last of a group."""
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        case.make([*make_params(names=SMALL), make()])
    _, optimizer = trained(case)
    with Unchanged(optimizer), pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [*make_params(names=("experts",)), make()]})


@every_case
def test_a_parameter_in_two_groups_changes_nothing(case):
    params, optimizer = trained(case)
    with Unchanged(optimizer), pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [*make_params(names=("experts",)), params[0]]})


@every_case
def test_stochastic_rounding_of_float16_is_refused(case):
    """Its noise would be biased below 6e-5; bfloat16 and float32 parameters may share a group with the option."""
    with pytest.raises((ValueError, TypeError), match="float16"):
        case.make(make_params(torch.float16, SMALL), stochastic_rounding=True)
    case.make([*make_params(torch.bfloat16, SMALL), *make_params(torch.float32, SMALL)], stochastic_rounding=True)


@every_case
def test_empty_parameter_list_is_refused(case):
    with pytest.raises(ValueError, match="empty parameter list"):
        case.make([])


@pytest.mark.parametrize("capturable", [False, True])
@every_case
def test_a_group_may_have_no_parameters(case, capturable):
    params = make_params(names=SMALL)
    optimizer = case.make([{"params": []}, {"params": params}], capturable=capturable)
    take_steps(optimizer, params, 1)
    assert len(optimizer.state) == len(params)


def sparse(param):
    param.grad = torch.sparse_coo_tensor([[0]], [[1.0] * param.shape[1]], tuple(param.shape), check_invariants=True)


def changed_to_float64(param):
    param.grad = None
    param.data = param.data.double()
    param.grad = torch.ones_like(param)


def gradient_in_float64(param):
    param.grad = None
    param.grad_dtype = None
    param.grad = torch.ones_like(param, dtype=torch.float64)


@pytest.mark.parametrize("first_step", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (sparse, r"the gradient of 2 is torch.sparse_coo; allowed: dense"),
        (changed_to_float64, r"a parameter is float64; allowed: float32, bfloat16, float16"),
        (gradient_in_float64, r"the gradient of .* is float64; allowed: float32, bfloat16, float16"),
    ],
    ids=["sparse", "float64", "float64-gradient"],
)
@every_case
def test_a_bad_last_gradient_changes_nothing(case, spoil, message, first_step):
    """Not even the parameters before it, and no state is made."""
    params = make_params(names=("vector", "experts", "matrix"))
    optimizer = case.make(params)
    if not first_step:
        take_steps(optimizer, params, 2)
    set_gradients(params, 2)
    spoil(params[-1])
    before, states = copies(params), len(optimizer.state)
    with Unchanged(optimizer), pytest.raises((RuntimeError, TypeError), match=message):
        optimizer.step()
    assert_same_bits(params, before)
    assert len(optimizer.state) == states
