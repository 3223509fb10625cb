"""NaN and Inf in gradients, for each value of skip_nonfinite."""

import pytest
import torch

from optim.every import CASES, both_dtypes, every_case
from optim.tensors import (
    SMALL,
    Unchanged,
    assert_same_bits,
    assert_same_states,
    copies,
    make_params,
    same_bits,
    set_gradients,
    states_of,
    take_steps,
)

bad_values = pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
coupled_cases = pytest.mark.parametrize("case", [c for c in CASES if c.couples_parameters], ids=lambda case: case.name)
uncoupled_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if not c.couples_parameters], ids=lambda case: case.name
)
INDEX = (3, 5)
MATRIX = SMALL.index("matrix")


def spoiled_step(optimizer, params, bad, step=2):
    set_gradients(params, step)
    params[MATRIX].grad = params[MATRIX].grad.clone()
    params[MATRIX].grad[INDEX] = bad
    optimizer.step()


def run(case, dtype, skip_nonfinite):
    params = make_params(dtype, SMALL)
    optimizer = case.make_groups(params, skip_nonfinite=skip_nonfinite)
    take_steps(optimizer, params, 2)
    return params, optimizer


def untouched(before, after_clean_step, case):
    """What a tensor has to be after the spoiled step: the clean result, and the old value where it was spoiled."""
    if not case.elementwise and not case.rowwise:
        return before
    where = INDEX[0] if case.rowwise else INDEX
    expected = after_clean_step.clone()
    expected[where] = before[where]
    return expected


@bad_values
@both_dtypes
@uncoupled_cases
def test_tensor_keeps_what_a_bad_element_would_reach(case, dtype, bad):
    """Other parameters and, for elementwise rules, other elements (or rows) get the bits of a run without it."""
    params, optimizer = run(case, dtype, "tensor")
    clean, other = run(case, dtype, "tensor")
    before, state_before = copies(params), states_of(optimizer, params)
    spoiled_step(optimizer, params, bad)
    take_steps(other, clean, 1, first=2)
    expected = copies(clean)
    expected[MATRIX] = untouched(before[MATRIX], expected[MATRIX], case)
    assert_same_bits(params, expected)
    states = states_of(other, clean)
    for key in case.state_keys(params[MATRIX]):
        values = state_before[MATRIX][key], states[MATRIX][key]
        if values[0].shape == params[MATRIX].shape or case.rowwise:
            states[MATRIX][key] = untouched(*values, case)
    if not case.elementwise and not case.rowwise:
        states[MATRIX] = state_before[MATRIX]
    assert_same_states(states_of(optimizer, params), states)
    assert optimizer.nonfinite_count() == 1


@both_dtypes
@uncoupled_cases
def test_tensor_counts_what_it_keeps_in_every_step(case, dtype):
    """Elements, rows where one element stops its row, or tensors where it stops the tensor."""
    params, optimizer = run(case, dtype, "tensor")
    for step in range(3):
        set_gradients(params, step)
        params[0].grad[step : step + 2] = float("inf")
        params[1].grad = torch.full_like(params[1], float("nan"))
        optimizer.step()
    of_matrix = params[1].numel() if case.elementwise else len(params[1]) if case.rowwise else 1
    in_a_step = [2 if case.keeps_elements(params[0]) else 1, of_matrix]
    assert optimizer.nonfinite_count() == 3 * sum(in_a_step)
    assert all(p.isfinite().all() for p in params)


@bad_values
@both_dtypes
@coupled_cases
def test_tensor_stops_the_step_where_a_norm_couples_all_gradients(case, dtype, bad):
    params, optimizer = run(case, dtype, "tensor")
    with Unchanged(optimizer):
        spoiled_step(optimizer, params, bad)
    assert optimizer.nonfinite_count() == 1
    take_steps(optimizer, params, 1, first=2)


@bad_values
@both_dtypes
@every_case
def test_step_moves_nothing_anywhere(case, dtype, bad):
    """Parameters of other groups, states and step counters too; the next step is as if this one had not been."""
    params, optimizer = run(case, dtype, "step")
    clean, other = run(case, dtype, "step")
    with Unchanged(optimizer):
        spoiled_step(optimizer, params, bad)
    assert optimizer.nonfinite_count() == 1
    assert other.nonfinite_count() == 0
    take_steps(optimizer, params, 1, first=3)
    take_steps(other, clean, 1, first=3)
    assert_same_bits(params, clean)


@every_case
def test_step_in_one_group_speaks_for_all(case):
    """The option of one group stops others as well: half a step would be no step."""
    params = make_params(names=SMALL)
    optimizer = case.make([{"params": params[:1], "skip_nonfinite": "step"}, {"params": params[1:]}])
    take_steps(optimizer, params, 2)
    with Unchanged(optimizer):
        spoiled_step(optimizer, params, float("nan"))


@both_dtypes
@every_case
def test_false_lets_nan_reach_the_parameter(case, dtype):
    params, optimizer = run(case, dtype, False)
    spoiled_step(optimizer, params, float("nan"))
    assert params[MATRIX][INDEX].isnan()
    if not case.couples_parameters:
        assert all(p.isfinite().all() for i, p in enumerate(params) if i != MATRIX)
        assert optimizer.nonfinite_count() == 0
    if case.elementwise and not case.couples_parameters:
        assert params[MATRIX].isnan().sum() == 1


@both_dtypes
@uncoupled_cases
def test_false_lets_inf_act_as_arithmetic_says(case, dtype):
    """It reaches the element, unless it is clamped to a finite bound before."""
    params, optimizer = run(case, dtype, False)
    before = copies(params)
    spoiled_step(optimizer, params, float("inf"))
    assert bool(params[MATRIX][INDEX].isfinite()) is case.bounds_elements
    assert not same_bits(params[MATRIX][INDEX], before[MATRIX][INDEX])


@pytest.mark.parametrize("skip_nonfinite", ["tensor", "step", False])
@both_dtypes
@every_case
def test_finite_gradients_get_the_same_bits_from_every_policy(case, dtype, skip_nonfinite):
    params, optimizer = run(case, dtype, skip_nonfinite)
    others, other = run(case, dtype, "tensor")
    assert_same_bits(params, others)
    assert_same_states(states_of(optimizer, params), states_of(other, others))
    assert optimizer.nonfinite_count() == 0


@every_case
def test_the_count_is_not_part_of_a_checkpoint(case):
    params, optimizer = run(case, torch.float32, "tensor")
    spoiled_step(optimizer, params, float("nan"))
    other = case.make_groups(make_params(names=SMALL))
    other.load_state_dict(optimizer.state_dict())
    assert other.nonfinite_count() == 0
    assert optimizer.nonfinite_count() == 1
