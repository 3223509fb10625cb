"""Updating in the backward pass gives every optimizer the bits of updating after it."""

import lomo_optim
import pytest
import torch

import lowmem_optim
from lowmem_optim import fuse_backward
from optim.every import CASES, both_dtypes, every_case
from optim.fused import Net, Weights, assert_same_runs, carry_on, run
from optim.tensors import LAYOUTS, SMALL, assert_same_bits, copies

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
uncoupled_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if not case.couples_parameters], ids=lambda case: case.name
)
coupled_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.couples_parameters], ids=lambda case: case.name
)


def exactly(model, handle, step):
    handle.backward(model.loss(step), exact=True)


@every_dtype
@uncoupled_cases
def test_fused_equals_unfused(case, dtype):
    """All layouts, two groups, stochastic rounding where that is the default."""
    if dtype is torch.float16 and case.refuses_float16:
        pytest.skip("refuses float16")
    some = run(case, True, dtype, tuple(LAYOUTS), groups=True)
    assert_same_runs(some, run(case, False, dtype, tuple(LAYOUTS), groups=True))
    assert not any(
        torch.equal(p, q)
        for p, q in zip(some[0].parameters(), Weights(dtype, tuple(LAYOUTS)).parameters(), strict=True)
        if p.numel()
    )


@every_case
def test_two_passes_equal_unfused_with_a_norm_that_does_not_clip(case):
    options = {"clip_grad_norm": 1e6} if case.couples_parameters else {}
    some = run(case, True, torch.bfloat16, options=options, backward=exactly)
    assert_same_runs(some, run(case, False, torch.bfloat16, options=options))


@both_dtypes
@coupled_cases
def test_two_passes_equal_unfused_where_a_norm_couples_all_gradients(case, dtype):
    """The norm adds up in another order: its last bit may differ, 2**-23 of each update."""
    some, others = run(case, True, dtype, backward=exactly), run(case, False, dtype)
    for p, q, start in zip(some[0].parameters(), others[0].parameters(), Weights(dtype).parameters(), strict=True):
        if dtype is torch.float32:
            assert (p - q).norm() <= 2**-21 * (p - start).norm() + 2**-23 * p.norm()
        else:
            assert (p != q).double().mean() <= 0.01
    assert some[2].grad_norm() > 0


@both_dtypes
@every_case
def test_accumulating_equals_accumulating_unfused(case, dtype):
    """Three micro-batches; the last one does not use all parameters, and its pass updates the others as well."""
    parts = [(0, None), (1, None), (2, (0, 1))]

    def fused_pass(model, handle, step):
        for i, indices in parts:
            loss = model.loss(step + 10 * i, indices=indices)
            if i < 2:
                with handle.accumulate():
                    loss.backward()
                assert all(p.grad is not None for p in model.parameters())
            else:
                handle.backward(loss, exact=case.couples_parameters)

    some = run(case, True, dtype, backward=fused_pass, steps=3)
    model, optimizer, _ = run(case, False, dtype, steps=0)
    for step in range(3):
        for i, indices in parts:
            model.loss(step + 10 * i, indices=indices).backward()
        optimizer.step()
        optimizer.zero_grad()
    if case.couples_parameters:
        # the norm's last bit, as above
        for p, q in zip(some[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6 if dtype is torch.float32 else 2**-7, atol=1e-6)
    else:
        assert_same_runs(some, (model, optimizer, None))


@every_case
def test_resuming_equals_not_stopping(case):
    """From fused to unfused and back, with checkpoints in between: who updates is not part of a checkpoint."""
    backward = exactly if case.couples_parameters else None
    options = {"clip_grad_norm": 1e6} if case.couples_parameters else {}
    whole = run(case, True, torch.bfloat16, steps=6, options=options, backward=backward)
    model, optimizer, _ = run(case, True, torch.bfloat16, steps=2, options=options, backward=backward)
    for fused, steps in ((False, (2, 3)), (True, (4, 5))):
        weights, saved = copies(model.parameters()), optimizer.state_dict()
        model, optimizer, handle = run(case, fused, torch.bfloat16, steps=0, options={**options, "weight_decay": 0.7})
        for param, value in zip(model.parameters(), weights, strict=True):
            param.data.copy_(value)
        optimizer.load_state_dict(saved)
        carry_on(model, optimizer, handle, steps, backward)
    assert_same_runs((model, optimizer, None), whole)


@every_case
def test_removing_the_handle_brings_back_ordinary_steps(case):
    backward = exactly if case.couples_parameters else None
    model, optimizer, handle = run(case, True, steps=2, backward=backward)
    with handle:
        carry_on(model, optimizer, handle, [2], backward)
    before = copies(model.parameters())
    model.loss(3).backward()
    assert_same_bits(model.parameters(), before)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    others = run(case, False)
    if not case.couples_parameters:
        assert_same_bits(model.parameters(), others[0].parameters())


@every_case
def test_unused_and_frozen_parameters_stay_and_get_no_state(case):
    model, optimizer, handle = run(case, True, steps=0)
    vector, matrix, transposed = model.parameters()
    starts = copies([vector, matrix])
    vector.requires_grad_(False)
    handle.backward(model.loss(0, indices=(2,)), exact=case.couples_parameters)
    assert_same_bits([vector, matrix], starts)
    assert set(optimizer.state) == {transposed}
    # a parameter that is thawed later
    vector.requires_grad_()
    handle.backward(model.loss(1), exact=case.couples_parameters)
    assert all(not torch.equal(p, q) for p, q in zip([vector, matrix], starts, strict=True))
    assert [int(optimizer.state[p]["step"]) for p in (vector, matrix, transposed)] == [1, 1, 2]


def test_layouts_are_all_there():
    assert set(SMALL) < set(LAYOUTS)


@pytest.mark.parametrize("name", ["Lomo", "AdaLomo"])
def test_the_published_algorithms_in_the_loop_of_their_package(name, monkeypatch):
    """Two passes with a bound on the norm that clips, and decay; float32, a few roundings apart."""
    # of the package, where there is no GPU
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    options = {"lr": 1e-2, "clip_grad_norm": 1.0, "weight_decay": 0.1}
    model, theirs = Net().eval(), Net().eval()
    handle = fuse_backward(model, getattr(lowmem_optim, name)(model.named_parameters(), **options))
    package = getattr(lomo_optim, name)(theirs, **options)
    for step in range(4):
        handle.backward(model.loss(step) * 50, exact=True)
        loss = theirs.loss(step) * 50
        package.grad_norm(loss)
        package.fused_backward(loss, options["lr"])
        assert handle.grad_norm() > 1
    for p, q, start in zip(model.parameters(), theirs.parameters(), Net().parameters(), strict=True):
        assert (p - q).norm() <= 1e-5 * (p - start).norm() + 2**-22 * p.norm()
        assert not torch.equal(p, start)
