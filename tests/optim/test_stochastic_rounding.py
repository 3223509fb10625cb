"""Stochastic rounding as optimizers use it: what the noise depends on, and that it is fair."""

import pytest
import torch
from torch import nn

from optim.every import cases_with_lr, every_case
from optim.tensors import (
    LAYOUTS,
    SMALL,
    assert_same_bits,
    assert_same_states,
    copies,
    make_named_params,
    make_params,
    states_of,
    take_steps,
    values,
)


def run(case, named=False, names=SMALL, steps=4, order=1, **options):
    """bfloat16 parameters by name after some steps, and their optimizer."""
    params = make_named_params(torch.bfloat16, names)
    items = list(params.items())[::order]
    optimizer = case.make(items if named else [p for _, p in items], **options)
    for step in range(steps):
        for name, param in items:
            # one gradient per name, whatever else there is
            seed = 1000 * step + list(LAYOUTS).index(name)
            param.grad = values(*param.shape, seed=seed).bfloat16() if name != "experts" else torch.zeros_like(param)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1])
@every_case
def test_same_seed_gives_the_same_bits(case, seed):
    first, optimizer = run(case, seed=seed)
    second, other = run(case, seed=seed)
    assert_same_bits(list(first.values()), list(second.values()))
    assert_same_states(states_of(optimizer, first.values()), states_of(other, second.values()))


@pytest.mark.parametrize("seeds", [(0, 1), (1, -1), (0, 2**32), (5, 5 + 2**40)])
@every_case
def test_other_seeds_give_other_bits(case, seeds):
    """All 64 bits of the seed count."""
    first, second = (run(case, seed=seed)[0] for seed in seeds)
    assert all(not torch.equal(first[name], second[name]) for name in SMALL)


@every_case
def test_global_generators_play_no_part(case):
    first, _ = run(case)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    second, _ = run(case)
    assert_same_bits(list(first.values()), list(second.values()))
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_equal_parameters_get_different_noise(case):
    """By position and by name: equal bits and gradients drift apart."""
    for named in (False, True):
        params = [nn.Parameter(values(64, seed=0).bfloat16()) for _ in range(2)]
        optimizer = case.make(list(zip("ab", params, strict=True)) if named else params)
        for param in params:
            param.grad = values(64, seed=1).bfloat16()
        optimizer.step()
        assert not torch.equal(*params)


@cases_with_lr
def test_noise_changes_from_step_to_step(case):
    """The same small step again and again; with one noise for all, an element would always fall to the same side."""
    param = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
    optimizer = case.make([param], lr=2**-10, weight_decay=0.0)
    moved = []
    for _ in range(4):
        param.data.fill_(1.0)
        param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        moved.append(param.detach() != 1)
    assert all(0 < m.sum() < 256 for m in moved)
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[1], moved[2])


@every_case
def test_order_of_named_parameters_does_not_matter(case):
    first, _ = run(case, named=True)
    second, _ = run(case, named=True, order=-1)
    assert_same_bits([first[name] for name in SMALL], [second[name] for name in SMALL])


@every_case
def test_another_named_parameter_does_not_change_the_others(case):
    """It is put in between, and its gradient is zero, so that a norm over all gradients stays too."""
    first, _ = run(case, named=True)
    second, _ = run(case, named=True, names=("vector", "experts", "matrix", "transposed"))
    assert_same_bits([first[name] for name in SMALL], [second[name] for name in SMALL])


@every_case
def test_it_is_on_for_bfloat16_and_off_for_other_dtypes(case):
    default, on, off = (run(case, stochastic_rounding=value)[0] for value in (None, True, False))
    assert_same_bits(list(default.values()), list(on.values()))
    assert all(not torch.equal(default[name], off[name]) for name in SMALL)
    results = []
    for value in (None, True, False):
        params = make_params(torch.float32, SMALL)
        seed = 0 if case.draws else id(value)
        take_steps(case.make(params, stochastic_rounding=value, seed=seed), params, 2)
        results.append(copies(params))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@every_case
def test_each_write_goes_to_one_of_the_two_neighbours(case):
    """One step from exact values: the float32 result lies between, or is the bfloat16 result."""
    half = make_params(torch.bfloat16)
    full = [nn.Parameter(p.detach().float()) for p in half]
    for params in (half, full):
        optimizer = case.make(params)
        for i, param in enumerate(params):
            param.grad = values(*param.shape, seed=i).bfloat16().to(param.dtype)
        optimizer.step()
    for rounded, exact in zip(half, full, strict=True):
        distance = (rounded.detach().double() - exact.detach().double()).abs()
        assert (distance < 2**-7 * torch.maximum(rounded.abs(), exact.abs()) + 1e-30).all()


@cases_with_lr
def test_hundreds_of_tiny_steps_move_as_far_as_in_float32(case):
    """Steps of at most 1/10 of a spacing, which rounding to nearest would all drop.

    The noise of one element is independent of another's, so the mean over 4096 of them lies within 5 standard errors
    (about 0.5 % of the way each) of float32's, in which the same values take the same steps.
    """
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        param = nn.Parameter((1 + values(4096, seed=0).abs().clamp(max=0.9)).bfloat16().to(dtype))
        start = param.detach().float().clone()
        optimizer = case.make([param], lr=4e-4, weight_decay=1e-2)
        for _ in range(400):
            param.grad = torch.full_like(param, -1.0)
            optimizer.step()
        ends[dtype] = param.detach().float() - start
    way = ends[torch.float32].mean()
    difference = ends[torch.bfloat16] - ends[torch.float32]
    standard_error = difference.std() / 4096**0.5
    assert way.abs() > 50 * standard_error
    assert difference.mean().abs() <= 5 * standard_error
