"""Every optimizer on the kernels, in Triton's interpreter: equal to the torch backend, in few launches."""

import pytest
import torch
from torch import Tensor, nn
from triton.runtime.interpreter import GridExecutor

from lowmem_kernels.numerics import parity_tolerance
from optim.every import CASES, both_dtypes, cases_with_lr, every_case
from optim.tensors import (
    SMALL,
    Unchanged,
    assert_same_bits,
    assert_same_states,
    copies,
    make_params,
    set_gradients,
    states_of,
    take_steps,
    values,
)

STEPS = 2
#: the interpreter takes about 50 ms for a parameter and step
MIXED = ("scalar", "matrix", "conv_channels_last", "strided", "empty")


@pytest.fixture
def launches(monkeypatch):
    """A list that grows by one entry, the kernel's name, with every launch."""
    names = []
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


def run(case, backend, dtype, steps=STEPS, **options):
    params = make_params(dtype, MIXED)
    optimizer = case.make_groups(params, backend=backend, **options)
    take_steps(optimizer, params, steps)
    return params, optimizer


@every_case
def test_float32_equals_the_torch_backend(case, launches):
    params, optimizer = run(case, "triton", torch.float32)
    assert launches
    launches.clear()
    others, other = run(case, "torch", torch.float32)
    assert not launches
    for layout, p, q, start in zip(MIXED, params, others, make_params(names=MIXED), strict=True):
        distance = torch.linalg.vector_norm((p - q).detach().double()).item()
        assert distance <= parity_tolerance(start, q.detach(), STEPS), layout
    for state, expected in zip(states_of(optimizer, params), states_of(other, others), strict=True):
        assert list(state) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=2e-6, atol=2e-6 * size(value))


def size(value):
    return value.abs().max().item() if isinstance(value, Tensor) and value.numel() else 0.0


@pytest.mark.parametrize("stochastic_rounding", [True, False], ids=["stochastic", "nearest"])
@every_case
def test_bfloat16_equals_the_torch_backend(case, stochastic_rounding):
    """Both draw the same noise, so an element differs only where fp32 results on either side of a threshold do.

    They differ by about 2**-24 of themselves, which is 2**-16 of a spacing: 1 in 100 is allowed for the writes of
    parameters and states in all steps.
    """
    params, _ = run(case, "triton", torch.bfloat16, stochastic_rounding=stochastic_rounding)
    others, _ = run(case, "torch", torch.bfloat16, stochastic_rounding=stochastic_rounding)
    actual, expected = (torch.cat([p.detach().reshape(-1) for p in ps]) for ps in (params, others))
    assert (actual != expected).double().mean() <= 0.01
    torch.testing.assert_close(actual, expected, rtol=2 * 2**-7, atol=0)
    starts = torch.cat([p.detach().reshape(-1) for p in make_params(torch.bfloat16, MIXED)])
    assert (actual != starts).double().mean() > 0.5


@both_dtypes
@every_case
def test_resuming_equals_not_stopping(case, dtype):
    params, optimizer = run(case, "triton", dtype, steps=2)
    again = [nn.Parameter(p) for p in copies(params)]
    resumed = case.make([{"params": again[::2]}, {"params": again[1::2]}], weight_decay=0.5, seed=99)
    resumed.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, params, 1, first=2)
    take_steps(resumed, again, 1, first=2)
    assert_same_bits(again, params)
    assert_same_states(states_of(resumed, again), states_of(optimizer, params))


@every_case
def test_launches_do_not_grow_with_the_number_of_parameters(case, monkeypatch):
    """Launches are counted and not run."""
    launches = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launches.append(self.fn.__name__))
    counts = []
    for count in (6, 60):
        params = [nn.Parameter(values(5 + i % 3, 4, seed=i)) for i in range(count)]
        optimizer = case.make(params, backend="triton")
        set_contiguous_gradients(params)
        launches.clear()
        optimizer.step()
        counts.append(len(launches))
    assert counts[0] == counts[1]
    assert 1 <= counts[0] <= 8


def set_contiguous_gradients(params):
    for i, param in enumerate(params):
        param.grad = values(*param.shape, seed=i)


@both_dtypes
@cases_with_lr
def test_zero_gradients_with_lr_0_change_no_parameter_bit(case, dtype):
    params, starts = make_params(dtype, SMALL), make_params(dtype, SMALL)
    optimizer = case.make(params, lr=0.0, weight_decay=0.1, backend="triton")
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(params, starts)


@both_dtypes
@every_case
def test_a_skipped_step_changes_nothing(case, dtype):
    params, optimizer = run(case, "triton", dtype, steps=1, skip_nonfinite="step")
    set_gradients(params, 1)
    params[1].grad[0, 0] = float("nan")
    with Unchanged(optimizer):
        optimizer.step()
    assert optimizer.nonfinite_count() == 1


@every_case
def test_kept_elements_are_those_of_the_torch_backend(case):
    """skip_nonfinite="tensor" counts and keeps alike on both backends."""
    results = []
    for backend in ("triton", "torch"):
        params = make_params(names=SMALL)
        optimizer = case.make(params, backend=backend)
        starts = copies(params)
        set_gradients(params, 1)
        params[0].grad[3] = float("inf")
        optimizer.step()
        results.append((optimizer.nonfinite_count(), [p == s for p, s in zip(params, starts, strict=True)]))
    assert results[0][0] == results[1][0] == 1
    assert_same_bits(results[0][1], results[1][1])


@cases_with_lr
def test_tensor_lr_equals_a_number(case):
    results = []
    for lr in (2**-6, torch.tensor(2**-6)):
        params = make_params(torch.bfloat16, SMALL)
        take_steps(case.make(params, lr=lr, backend="triton"), params, 2)
        results.append(params)
    assert_same_bits(*results)


@pytest.mark.parametrize("case", [c for c in CASES if not c.elementwise], ids=lambda case: case.name)
def test_what_is_written_between_steps_counts(case):
    """Also where the sum of p² is carried from one step to the next: it was that of other values."""
    results = []
    for backend in ("triton", "torch"):
        params = make_params(names=("vector", "matrix"))
        optimizer = case.make(params, backend=backend)
        take_steps(optimizer, params, 1)
        with torch.no_grad():
            params[1].mul_(8.0)
        take_steps(optimizer, params, 1, first=1)
        results.append(params)
    for p, q, start in zip(*results, make_params(names=("vector", "matrix")), strict=True):
        distance = torch.linalg.vector_norm((p - q).detach().double()).item()
        assert distance <= parity_tolerance(start, q.detach(), 2)
