"""Trajectories of 50 steps against float64 oracles and against other implementations."""

import pytest
import torch

from lowmem_kernels.numerics import parity_tolerance
from optim.cases import discover, exported
from optim.every import CASES, cases_with_lr, every_case, every_peer
from optim.tensors import LAYOUTS, copies, gradient, make_params, set_gradients, to_numpy

STEPS = 50


def schedule(step):
    """Linear warm-up and linear decay; never 0."""
    return min(1.0, (step + 1) / 10) * (1 - step / 100)


def test_every_exported_optimizer_has_a_case():
    assert set(exported().values()) == {case.optimizer for case in discover()}
    assert len({case.name for case in CASES}) == len(CASES)


def run_with_schedule(optimizer, params, before_step=lambda params: None):
    """Without a schedule where the optimizer makes its own."""
    own = optimizer.param_groups[0]["lr"] is None
    scheduler = None if own else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(STEPS):
        set_gradients(params, step)
        before_step(params)
        optimizer.step()
        if not own:
            scheduler.step()


def run_oracle(case, params):
    """The oracle's parameters and states after the run of `run_with_schedule` over `case.make_groups`."""
    grads, options = [], []
    for step in range(STEPS):
        set_gradients(params, step)
        grads.append(to_numpy(p.grad for p in params))
        options.append([case.options_at(i) for i in range(len(params))])
        for o in options[-1]:
            o["lr"] = None if o["lr"] is None else o["lr"] * schedule(step)
    return case.oracle(to_numpy(params), grads, options)


def assert_within_parity(actual, expected, starts, layouts=tuple(LAYOUTS)):
    for layout, p, q, start in zip(layouts, actual, expected, starts, strict=True):
        end = torch.as_tensor(q).double()
        distance = torch.linalg.vector_norm(p.detach().double() - end).item()
        assert distance <= parity_tolerance(start, end, STEPS), f"{layout} is {distance:.2e} away"
        assert start.numel() == 0 or not torch.equal(start, p), f"{layout} did not move"


@every_case
def test_parameters_and_states_follow_the_oracle_for_50_steps(case):
    """A moving average forgets old rounding errors, so a state is 5e-6 of its norm away at most: about 40 spacings."""
    params, starts = make_params(), make_params()
    expected, states = run_oracle(case, starts)
    optimizer = case.make_groups(params)
    run_with_schedule(optimizer, params)
    assert_within_parity(params, expected, starts)
    for param, state in zip(params, states, strict=True):
        for key, value in state.items():
            value = torch.as_tensor(value)
            distance = torch.linalg.vector_norm(optimizer.state[param][key].double() - value)
            assert distance <= 5e-6 * torch.linalg.vector_norm(value), key


@every_peer
def test_parameters_equal_the_peers_after_50_steps(case, peer):
    """Torch's fused kernels ignore strides on a CPU, so the peer's parameters and gradients are contiguous."""
    starts, ours = (make_params(peer.dtype, peer.layouts) for _ in range(2))
    theirs = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in starts]
    optimizer = case.make_groups(ours, **peer.options)
    options = [{**case.options_at(i), **peer.options} for i in (0, 1)]
    options = [{k: v for k, v in o.items() if k not in peer.unknown} for o in options]
    other = peer.make([{"params": theirs[i::2], **options[i]} for i in (0, 1)])

    def prepare(params):
        for param in params:
            param.grad = param.grad.contiguous()
        peer.before_step(params)

    run_with_schedule(optimizer, ours)
    run_with_schedule(other, theirs, prepare)
    if peer.dtype is torch.float32:
        assert_within_parity(ours, theirs, starts, peer.layouts)
    else:
        assert mismatches(ours, theirs) <= peer.mismatches
    pairs = [(optimizer.state[p], other.state[q]) for p, q in zip(ours, theirs, strict=True) if p.numel() > 0]
    for key in {key for ours, theirs in pairs for key in ours.keys() & theirs.keys()} - {"step"}:
        actual, expected = zip(*((a[key], b[key]) for a, b in pairs if key in a), strict=True)
        assert_same_moments(actual, expected, peer, key)


def assert_same_moments(actual, expected, peer, key):
    """bfloat16 as parameters; float32 as close as to the oracle's."""
    if actual[0].dtype is torch.bfloat16:
        assert mismatches(actual, expected) <= peer.state_mismatches, key
        return
    for a, b in zip(actual, expected, strict=True):
        assert torch.linalg.vector_norm((a - b).double()) <= 5e-6 * torch.linalg.vector_norm(b.double()), key


def mismatches(actual, expected):
    """The fraction of bfloat16 elements that differ; fails if one differs by more than two spacings.

    Two, because an element that is rounded otherwise once keeps the difference when it comes closer to 0.
    """
    actual, expected = flat(actual), flat(expected)
    assert ((actual - expected).abs() <= 2 * 2**-7 * torch.maximum(actual.abs(), expected.abs())).all()
    return (actual != expected).double().mean().item()


def flat(tensors):
    return torch.cat([t.detach().float().reshape(-1) for t in tensors])


@cases_with_lr
def test_weight_decay_is_decoupled_and_multiplied_by_lr(case):
    """With zero gradients a step is p *= 1 - lr * weight_decay, whatever the rule makes of gradients.

    Some rules' lr is relative to the size of the parameter.
    """
    params, starts = make_params(), make_params()
    optimizer = case.make(params, lr=0.1, weight_decay=0.3)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, start in zip(params, starts, strict=True):
        decay = 0.3 * case.decay(start.detach().double().numpy(), 0.1)
        torch.testing.assert_close(param.detach(), start.detach() * (1 - decay), rtol=2e-7, atol=0)


@every_case
def test_layout_does_not_matter(case):
    """Transposed, strided and contiguous parameters with equal values get equal bits, stochastic rounding included."""
    values = make_params(torch.bfloat16, ("matrix",))[0].detach()
    wide = torch.zeros(values.shape[0], 2 * values.shape[1], dtype=values.dtype)
    wide[:, ::2] = values
    results = []
    for view in (values.clone(), values.T.clone().T, wide[:, ::2]):
        param = torch.nn.Parameter(view)
        assert torch.equal(param, values)
        optimizer = case.make([param])
        for step in range(4):
            param.grad = gradient(param, step)
            if step % 2:
                param.grad = param.grad.T.contiguous().T
            optimizer.step()
        results.append(param.detach())
    assert not torch.equal(results[0], values)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_case
def test_gradients_are_left_as_they_are(case):
    params = make_params()
    optimizer = case.make(params)
    set_gradients(params, 0)
    grads = copies(p.grad for p in params)
    optimizer.step()
    for param, grad in zip(params, grads, strict=True):
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("case", [c for c in CASES if not c.refuses_float16], ids=lambda case: case.name)
def test_half_precision_parameters_follow_float32(case):
    """float16 holds 11 bits, so 10 writes to nearest are 10 half spacings (up to 2**-11 of the largest element) away.

    Gradients are equal: what rounding does to them grows with the condition of a matrix that is whitened.
    """
    results = {}
    for dtype in (torch.float32, torch.float16):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in make_params(torch.float16)]
        optimizer = case.make(params)
        for step in range(10):
            set_gradients(params, step)
            for param in params:
                param.grad = param.grad.half().to(dtype)
            optimizer.step()
        results[dtype] = params
    for half, full in zip(results[torch.float16], results[torch.float32], strict=True):
        assert half.dtype is torch.float16
        assert half.numel() == 0 or (half - full).abs().max() <= 10 * 2**-11 * full.abs().max()
