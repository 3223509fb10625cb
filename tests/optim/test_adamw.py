"""What AdamW alone promises: checkpoints of torch.optim.AdamW load and carry on as there."""

import copy

import pytest
import torch
from torch import nn

from lowmem_kernels.numerics import parity_tolerance
from lowmem_optim import AdamW
from optim.tensors import SMALL, Unchanged, assert_same_bits, copies, make_params, set_gradients, take_steps

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def torch_run(dtype, steps=5, **options):
    params = make_params(dtype, ("vector", "matrix"))
    optimizer = torch.optim.AdamW(params, **OPTIONS, **options)
    take_contiguous_steps(optimizer, params, steps)
    return params, optimizer


def take_contiguous_steps(optimizer, params, count, first=0):
    """Torch's fused kernels ignore strides on a CPU."""
    for step in range(first, first + count):
        set_gradients(params, step)
        for param in params:
            param.grad = param.grad.contiguous()
        optimizer.step()


def resumed(params, checkpoint, **options):
    again = [nn.Parameter(p) for p in copies(params)]
    optimizer = AdamW(again, lr=0.7, weight_decay=0.9, **options)
    optimizer.load_state_dict(checkpoint)
    return again, optimizer


@pytest.mark.parametrize("step_type", [torch.as_tensor, int, float])
@pytest.mark.parametrize("peer", [{"foreach": False}, {"fused": True}], ids=["loop", "fused"])
def test_torch_checkpoints_in_float32_carry_on_as_torch_does(peer, step_type):
    """Step counters were Python numbers in old checkpoints, and are tensors in new ones."""
    params, optimizer = torch_run(torch.float32, **peer)
    checkpoint = optimizer.state_dict()
    checkpoint = {
        **checkpoint,
        "state": {k: {**s, "step": step_type(s["step"])} for k, s in checkpoint["state"].items()},
    }
    starts = copies(params)
    again, ours = resumed(params, checkpoint)
    assert ours.param_groups[0]["lr"] == OPTIONS["lr"]
    assert ours.param_groups[0]["skip_nonfinite"] == "tensor"
    take_contiguous_steps(optimizer, params, 20, first=5)
    take_contiguous_steps(ours, again, 20, first=5)
    for start, p, q in zip(starts, again, params, strict=True):
        assert torch.linalg.vector_norm((p - q).double()) <= parity_tolerance(start, q.detach(), 20)
    assert ours.state[again[0]]["step"].dtype is torch.float32
    assert ours.state[again[0]]["step"] == 25


def test_torch_checkpoints_in_bfloat16_carry_on_as_torch_does():
    """To nearest and with state in bfloat16, as torch's: all but 1 % of the elements are the same 20 steps later."""
    params, optimizer = torch_run(torch.bfloat16, fused=True)
    again, ours = resumed(params, optimizer.state_dict(), state_dtype="param", stochastic_rounding=False)
    assert ours.state[again[0]]["exp_avg"].dtype is torch.bfloat16
    take_contiguous_steps(optimizer, params, 20, first=5)
    take_contiguous_steps(ours, again, 20, first=5)
    for p, q in zip(again, params, strict=True):
        assert (p != q).double().mean() <= 0.01
        torch.testing.assert_close(p, q, rtol=2 * 2**-7, atol=0)


def test_torch_checkpoints_in_bfloat16_widen_to_float32_state():
    params, optimizer = torch_run(torch.bfloat16)
    again, ours = resumed(params, optimizer.state_dict())
    for p, q in zip(again, params, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert ours.state[p][key].dtype is torch.float32
            assert torch.equal(ours.state[p][key], optimizer.state[q][key].float())
    take_steps(ours, again, 1, first=5)


def test_states_of_channels_last_parameters_are_stored_in_logical_order():
    params = make_params(names=("conv_channels_last",))
    optimizer = torch.optim.AdamW(params, **OPTIONS)
    take_steps(optimizer, params, 3)
    again, ours = resumed(params, optimizer.state_dict())
    assert_same_bits([ours.state[again[0]]["exp_avg"]], [optimizer.state[params[0]]["exp_avg"]])
    assert ours.state[again[0]]["exp_avg"].is_contiguous()


def test_amsgrad_checkpoints_are_refused():
    params, optimizer = torch_run(torch.float32, amsgrad=True)
    ours = AdamW(params)
    with Unchanged(ours), pytest.raises(ValueError, match="max_exp_avg_sq"):
        ours.load_state_dict(optimizer.state_dict())


def test_torch_loads_our_checkpoints():
    """The way back, for float32: torch ignores uid and our options."""
    params = make_params(names=SMALL)
    ours = AdamW(params, **OPTIONS)
    take_steps(ours, params, 5)
    again = [nn.Parameter(p) for p in copies(params)]
    optimizer = torch.optim.AdamW(again)
    optimizer.load_state_dict(copy.deepcopy(ours.state_dict()))
    starts = copies(params)
    take_steps(ours, params, 5, first=5)
    take_steps(optimizer, again, 5, first=5)
    for start, p, q in zip(starts, params, again, strict=True):
        assert torch.linalg.vector_norm((p - q).double()) <= parity_tolerance(start, q.detach(), 5)


def test_float16_parameters_with_their_own_state_dtype_are_refused():
    """Squares of gradients below 2e-4 would be 0 in float16."""
    good, bad = make_params(names=SMALL), make_params(torch.float16, SMALL)
    with pytest.raises(TypeError, match=r"state_dtype is 'param' and a parameter is float16; allowed: "):
        AdamW([*good, *bad], state_dtype="param")


@pytest.mark.parametrize("state_dtype", ["fp32", "param"])
def test_eps_is_added_outside_the_square_root(state_dtype):
    """One step from zero state: g / (|g| + eps), which tells eps outside from inside and from a sum of squares."""
    param = nn.Parameter(torch.tensor([1.0, 1.0]))
    param.grad = torch.tensor([1e-3, -1e-4])
    AdamW([param], lr=0.5, eps=1e-3, weight_decay=0.0, state_dtype=state_dtype).step()
    torch.testing.assert_close(param.detach(), torch.tensor([1 - 0.5 * 0.5, 1 + 0.5 / 11]), rtol=1e-6, atol=0)
