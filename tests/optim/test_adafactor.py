"""What Adafactor alone promises: an lr that it makes itself, and the constructor and schedule of transformers."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import AdafactorSchedule

from lowmem_optim import Adafactor, TorchAdafactor
from optim.tensors import SMALL, assert_same_bits, copies, make_params, set_gradients, take_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, r"lr is 0.001; allowed: None, since relative_step is True"),
        ({"lr": torch.tensor(0.5)}, r"lr is tensor\(0.5\S*\); allowed: None, since relative_step is True"),
        ({"relative_step": False}, r"lr is None; allowed: a finite number >= 0"),
        ({"lr": 1e-3, "relative_step": False, "warmup_init": True}, r"warmup_init is True; allowed: False, since"),
    ],
)
def test_combinations_that_transformers_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Adafactor(make_params(names=SMALL), **options)


def test_one_group_may_make_its_lr_and_another_take_one():
    params = make_params(names=SMALL)
    own = {"params": params[1:], "relative_step": False, "lr": 1e-3}
    optimizer = Adafactor([{"params": params[:1]}, own])
    take_steps(optimizer, params, 2)
    with pytest.raises(ValueError, match=r"^lr is None; allowed: "):
        optimizer.add_param_group({"params": make_params(names=("experts",)), "relative_step": False})


@pytest.mark.parametrize("warmup_init", [False, True])
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_what_others_write_into_lr_is_ignored(warmup_init, lr):
    params, others = make_params(names=SMALL), make_params(names=SMALL)
    optimizer = Adafactor(params, warmup_init=warmup_init, weight_decay=0.1)
    plain = Adafactor(others, warmup_init=warmup_init, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = lr
    take_steps(optimizer, params, 3)
    take_steps(plain, others, 3)
    assert_same_bits(params, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_lr_0_and_zero_gradients_change_no_parameter_bit(lr, dtype):
    """How torch.distributed.checkpoint creates state, where weight decay would be an update."""
    params, starts = make_params(dtype), make_params(dtype)
    optimizer = Adafactor(params, weight_decay=0.1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert_same_bits(params, starts)
    assert len(optimizer.state) == len(params)
    optimizer.param_groups[0]["lr"] = None
    optimizer.step()
    assert not torch.equal(params[2], starts[2])


def test_lr_none_survives_capturable_and_checkpoints():
    params = make_params(names=SMALL)
    optimizer = Adafactor(params, capturable=True)
    take_steps(optimizer, params, 2)
    again = [nn.Parameter(p) for p in copies(params)]
    resumed = Adafactor(again)
    resumed.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] is resumed.param_groups[0]["lr"] is None
    take_steps(optimizer, params, 2, first=2)
    take_steps(resumed, again, 2, first=2)
    assert_same_bits(again, params)


def test_a_scheduled_lr_survives_a_checkpoint():
    """A scheduler has written an lr into the group, which the constructor would refuse."""
    params = make_params(names=SMALL)
    optimizer = Adafactor(params)
    scheduler = AdafactorSchedule(optimizer)
    take_steps(optimizer, params, 2)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is not None
    resumed = Adafactor(make_params(names=SMALL))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    Adafactor(optimizer.param_groups)


@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("warmup_init", [False, True])
def test_the_schedule_of_transformers_reports_the_rate_of_the_first_parameter(warmup_init, scale_parameter):
    """With parameters of RMS 2, and steps so short that it stays 2 to 2 %."""
    param = nn.Parameter(torch.full((3, 4), 2.0))
    optimizer = Adafactor([param], warmup_init=warmup_init, scale_parameter=scale_parameter)
    scheduler = AdafactorSchedule(optimizer, initial_lr=0.5)
    assert scheduler.get_last_lr() == [0.5]
    for step in (1, 2, 3):
        take_steps(optimizer, [param], 1)
        scheduler.step()
        rate = (1e-6 * step if warmup_init else 1e-2) * (2 if scale_parameter else 1)
        assert scheduler.get_last_lr() == pytest.approx([rate], rel=0.02)


def test_a_schedule_of_torch_is_refused_by_torch():
    """There is nothing to multiply; `AdafactorSchedule` exists for that."""
    with pytest.raises(TypeError):
        LambdaLR(Adafactor(make_params(names=SMALL)), lambda step: 0.5)


def test_the_rate_falls_by_the_square_root_of_the_step():
    """From step 10**4 on it is below 1e-2: at 4 10**4 a step is half as long."""
    moved = []
    for step in (0, 10_000, 40_000):
        param = nn.Parameter(torch.ones(8))
        optimizer = Adafactor([param])
        optimizer.init_state()
        optimizer.state[param]["step"].fill_(step)
        optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved.append(1 - param[0].item())
    assert moved == pytest.approx([1e-2, 1e-2, 5e-3], rel=1e-3)


@pytest.mark.parametrize(("state_dtype", "dtype"), [("fp32", torch.float32), ("param", torch.bfloat16)])
def test_state_dtype_is_that_of_the_momentum_alone(state_dtype, dtype):
    params = make_params(torch.bfloat16, SMALL)
    optimizer = Adafactor(params, beta1=0.9, state_dtype=state_dtype)
    take_steps(optimizer, params, 2)
    for param in params:
        state = optimizer.state[param]
        assert state["exp_avg"].dtype is dtype
        assert {v.dtype for k, v in state.items() if k.startswith("exp_avg_sq")} == {torch.float32}


def test_a_checkpoint_with_momentum_needs_no_constructor_that_says_so():
    """The options of the checkpoint are in force after loading, so they say what state there is."""
    params = make_params(names=SMALL)
    optimizer = Adafactor(params, beta1=0.9)
    take_steps(optimizer, params, 2)
    again = [nn.Parameter(p) for p in copies(params)]
    resumed = Adafactor(again)
    resumed.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, params, 2, first=2)
    take_steps(resumed, again, 2, first=2)
    assert_same_bits(again, params)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_of_torch_is_taken_and_means_nothing(foreach):
    params, others = make_params(names=SMALL), make_params(names=SMALL)
    take_steps(TorchAdafactor(params, foreach=foreach), params, 2)
    take_steps(TorchAdafactor(others), others, 2)
    assert_same_bits(params, others)


def test_maximize_of_torch():
    params, others = make_params(names=SMALL), make_params(names=SMALL)
    ours, theirs = TorchAdafactor(params, maximize=True), torch.optim.Adafactor(others, maximize=True)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        ours.step()
        theirs.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
