"""Bounds on gradients, loss scales and overflows where gradients are used one after the other."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lowmem_optim import SWAN, AdaLomo, AdamW, Lomo, SinkGD, fuse_backward, fused_clipping
from optim.fused import Weights
from optim.tensors import LAYOUTS, SMALL, assert_same_bits, copies

NAMES = tuple(LAYOUTS)
OVERFLOW = "matrix"


def unfused(optimizer_of, clip, dtype=torch.float32, steps=3):
    """Parameters after steps in which ``clip`` is called with them before each."""
    model = Weights(dtype, NAMES)
    optimizer = optimizer_of(list(model.named_parameters()))
    for step in range(steps):
        model.loss(step).backward()
        clip(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


def fused(optimizer_of, exact=False, dtype=torch.float32, steps=3, **options):
    model = Weights(dtype, NAMES)
    optimizer = optimizer_of(list(model.named_parameters()))
    handle = fuse_backward(model, optimizer, **options)
    for step in range(steps):
        handle.backward(model.loss(step), exact=exact)
    return list(model.parameters()), handle


def assert_near(params, others):
    """To the last bits of a norm, which other sums give."""
    starts = Weights(torch.float32, NAMES).parameters()
    for p, q, start in zip(params, others, starts, strict=True):
        assert (p - q).norm() <= 2**-19 * (p - start).norm() + 2**-23 * p.norm()


def lomo(params):
    return Lomo(params, lr=0.1)


def adamw(params):
    return AdamW(params, lr=0.01)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("optimizer_of", [lomo, adamw])
def test_value(optimizer_of, exact):
    params, _ = fused(optimizer_of, exact, clip_grad_value=0.7)
    assert_same_bits(params, unfused(optimizer_of, lambda params: clip_grad_value_(params, 0.7)))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("optimizer_of", [lomo, adamw])
def test_norm_of_each_parameter(optimizer_of, exact):
    params, _ = fused(optimizer_of, exact, clip_param_norm=2.0)
    assert_near(params, unfused(optimizer_of, lambda params: [clip_grad_norm_([p], 2.0) for p in params]))


@pytest.mark.parametrize("optimizer_of", [lomo, adamw])
def test_exact_norm_of_all(optimizer_of):
    params, handle = fused(optimizer_of, exact=True, clip_grad_norm=5.0)
    norms = []
    assert_near(params, unfused(optimizer_of, lambda params: norms.append(clip_grad_norm_(params, 5.0))))
    torch.testing.assert_close(handle.grad_norm(), norms[-1], rtol=1e-6, atol=0)
    assert norms[-1] > 5


def test_the_bound_of_the_optimizer_counts_where_the_handle_has_none():
    with_option, _ = fused(lambda params: Lomo(params, lr=0.1, clip_grad_norm=5.0), exact=True)
    assert_same_bits(with_option, fused(lomo, exact=True, clip_grad_norm=5.0)[0])
    with_option, _ = fused(lambda params: AdaLomo(params, lr=0.1, clip_grad_value=0.3))
    assert_same_bits(with_option, fused(lambda params: AdaLomo(params, lr=0.1), clip_grad_value=0.3)[0])


def test_running_norm_of_one_parameter_step_by_step():
    """max(decaying mean of earlier norms, this norm), in float64."""
    model = nn.Linear(4, 3, bias=False)
    optimizer = Lomo(model.parameters(), lr=1.0)
    handle = fuse_backward(model, optimizer, clip_grad_norm=1.0)
    total = weight = 0.0
    for step in range(6):
        grad = torch.full((3, 4), (5.0, 1.0, 40.0, 0.1, 2.0, 3.0)[step])
        before, norm = model.weight.detach().clone(), grad.norm().item()
        (model.weight * grad).sum().backward()
        estimate = max(total / weight if weight else 0.0, norm)
        moved = (before - model.weight.detach()).double()
        torch.testing.assert_close(moved, grad.double() * min(1.0, 1 / estimate), rtol=1e-5, atol=1e-6)
        assert handle.grad_norm().item() == pytest.approx(norm, rel=1e-6)
        total, weight = 0.9 * total + 0.1 * norm, 0.9 * weight + 0.1


def test_running_norm_is_near_the_norm_when_that_changes_slowly():
    """Once it is known, updates are as long as with the norm itself."""
    model = Weights(torch.float32, NAMES)
    handle = fuse_backward(model, Lomo(list(model.named_parameters()), lr=1.0), clip_grad_norm=1.0)
    for _ in range(3):
        before = copies(model.parameters())
        model.loss(1).backward()
        moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    assert torch.stack([m.norm() for m in moved]).norm().item() == pytest.approx(1.0, rel=1e-4)
    assert handle.grad_norm() > 5


def test_a_sudden_large_gradient_moves_no_group_by_more_than_the_bound():
    """The running mean knows nothing of it, the norm so far does."""
    model = Weights(torch.float32, NAMES)
    optimizer = Lomo(list(model.named_parameters()), lr=1.0)
    fuse_backward(model, optimizer, clip_grad_norm=1.0)
    model.loss(0).backward()
    before = copies(model.parameters())
    model.loss(1, size=1e6).backward()
    moved = [(p.detach() - q).norm().item() for p, q in zip(model.parameters(), before, strict=True)]
    assert max(moved) <= 1.0001


def test_what_is_not_finite_does_not_enter_the_norm():
    """It keeps its parameter, others are clipped by what is known, and the running norm stays."""
    model = Weights(names=SMALL)
    optimizer = AdaLomo(list(model.named_parameters()), lr=0.1)
    handle = fuse_backward(model, optimizer, clip_grad_norm=1.0)
    model.loss(0).backward()
    before, norm = copies(model.parameters()), optimizer.param_groups[0]["fused_norm"].clone()
    model.loss(1, spoil=OVERFLOW).backward()
    for (name, p), q in zip(model.named_parameters(), before, strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, q) == (name == OVERFLOW)
    assert torch.equal(optimizer.param_groups[0]["fused_norm"], norm)
    assert handle.grad_norm().isfinite()


def test_infinity_only_measures():
    params, handle = fused(lomo, clip_grad_norm=math.inf)
    norms = []
    assert_same_bits(params, unfused(lomo, lambda params: norms.append(clip_grad_norm_(params, math.inf))))
    torch.testing.assert_close(handle.grad_norm(), norms[-1], rtol=1e-6, atol=0)
    assert fused(lomo)[1].grad_norm() is None


@pytest.mark.parametrize("optimizer", [SinkGD, SWAN])
def test_bounds_on_norms_are_nothing_to_rules_that_do_not_depend_on_scale(optimizer):
    """But for the fallback, which gets no parameter here; up to a thousandth of an update, which rounding makes."""

    def make(model):
        return optimizer(model.parameters(), lr=0.1, scale=1.0)

    results = []
    for bound in (None, 1e-2):
        torch.manual_seed(0)
        model = nn.Linear(6, 5, bias=False)
        fuse_backward(model, make(model), clip_param_norm=bound)
        for step in range(3):
            (model.weight * torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).sum().backward()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1024.0, "dynamic"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_loss_scale_changes_no_bit(scale, exact):
    params, handle = fused(lambda params: AdaLomo(params, lr=0.1), exact, loss_scale=scale)
    plain, _ = fused(lambda params: AdaLomo(params, lr=0.1), exact)
    assert_same_bits(params, plain)
    assert handle.loss_scale() == (65536 if scale == "dynamic" else 1024)


@pytest.mark.parametrize("optimizer", [Lomo, AdaLomo], ids=["elements", "parameters"])
@pytest.mark.parametrize("exact", [False, True])
def test_an_overflow_skips_what_the_mode_says(optimizer, exact):
    """float16: in one pass only the element or the parameter keeps its value; in two nothing moves."""
    model, elements = Weights(torch.float16, SMALL), optimizer is Lomo
    # a gradient of about 2**-8, which the scale does not make overflow
    optimizer = optimizer(list(model.named_parameters()), lr=20.0 if elements else 0.1)
    handle = fuse_backward(model, optimizer, loss_scale="dynamic")
    before = copies(model.parameters())
    handle.backward(model.loss(0, spoil=OVERFLOW, size=2**-8), exact=exact)
    assert handle.loss_scale() == 32768
    assert optimizer.nonfinite_count() == 1
    moved = {n: not torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), before, strict=True)}
    assert model.get_parameter(OVERFLOW).isfinite().all()
    if exact:
        assert not any(moved.values())
    else:
        assert all(moved[name] for name in SMALL if name != OVERFLOW)
        assert moved[OVERFLOW] == elements
    handle.backward(model.loss(0, size=2**-8), exact=exact)
    assert handle.loss_scale() == 32768
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_dynamic_scale_grows_again(monkeypatch):
    monkeypatch.setattr(fused_clipping, "GROWTH_INTERVAL", 3)
    model = Weights()
    handle = fuse_backward(model, Lomo(list(model.named_parameters())), loss_scale="dynamic")
    scales = []
    for step in range(9):
        handle.backward(model.loss(step, spoil=OVERFLOW if step in (1, 2) else ""))
        scales.append(int(handle.loss_scale()) // 2**12)
    assert scales == [16, 8, 4, 4, 4, 8, 8, 8, 16]


def test_norm_and_scale_are_in_the_optimizers_checkpoint():
    def make():
        model = Weights()
        optimizer = Lomo(list(model.named_parameters()), lr=0.1)
        return model, optimizer, fuse_backward(model, optimizer, clip_grad_norm=1.0, loss_scale="dynamic")

    model, optimizer, handle = make()
    other, other_optimizer, other_handle = make()
    for step in range(3):
        handle.backward(model.loss(step, spoil=OVERFLOW if step == 1 else ""))
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_handle.loss_scale() == 32768
    for step in range(3, 5):
        handle.backward(model.loss(step))
        other_handle.backward(other.loss(step))
    assert_same_bits(model.parameters(), other.parameters())
    # and another run without it is another one
    other, _, other_handle = make()
    other.load_state_dict(model.state_dict())
    handle.backward(model.loss(5, size=0.3))
    other_handle.backward(other.loss(5, size=0.3))
    assert not torch.equal(model.matrix, other.matrix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0; allowed: a finite number > 0"),
        ({"clip_grad_value": math.inf}, "clip_grad_value is inf; allowed: a finite number > 0"),
        ({"clip_param_norm": -1}, "clip_param_norm is -1; allowed: a finite number > 0"),
        ({"clip_param_norm": 1.0, "clip_grad_norm": 1.0}, "clip_param_norm is 1.0 and there is a clip_grad_norm"),
        ({"loss_scale": "static"}, "loss_scale is 'static'; allowed: None, a number > 0, 'dynamic'"),
        ({"loss_scale": 0}, "loss_scale is 0; allowed: a finite number > 0"),
    ],
)
def test_bad_options(options, message):
    model = Weights()
    with pytest.raises(ValueError, match=message):
        fuse_backward(model, Lomo(model.parameters()), **options)
