"""What goes wrong in other implementations of factored rules, each shown there if that is cheap, and absent here."""

import pytest
import torch
import transformers
from came_pytorch import CAME as PackageCAME
from torch import nn
from transformers.optimization import AdafactorSchedule

from lowmem_optim import CAME, Adafactor, AdaLomo, TorchAdafactor
from optim.tensors import assert_same_bits, assert_same_states, copies, make_params, states_of, take_steps, values

OURS = [Adafactor, TorchAdafactor, AdaLomo, CAME]
ours = pytest.mark.parametrize("optimizer", OURS)


def displacement(optimizer, scale, dtype, steps=5, **options):
    """RMS distance covered by a matrix of RMS 0.02 with gradients of a scale; rows differ by a factor of 10."""
    param = nn.Parameter((0.02 * values(64, 48, seed=0)).to(dtype))
    start, rows = param.detach().clone(), torch.logspace(-0.5, 0.5, 64)[:, None]
    optimizer = optimizer([param], **options)
    for step in range(steps):
        param.grad = (scale * rows * values(64, 48, seed=step + 1)).to(dtype)
        optimizer.step()
    return (param.detach().float() - start.float()).square().mean().sqrt().item()


@pytest.mark.parametrize("optimizer", [Adafactor, TorchAdafactor, AdaLomo])
def test_bfloat16_adapts_to_small_gradients(optimizer):
    """torch's default eps1 is the spacing of bfloat16, 0.008: for gradients below it, steps shrink with them."""
    here = [displacement(optimizer, scale, torch.bfloat16) for scale in (1e-1, 1e-4)]
    there = [displacement(torch.optim.Adafactor, scale, torch.bfloat16) for scale in (1e-1, 1e-4)]
    assert here[1] == pytest.approx(here[0], rel=0.05)
    assert there[1] < 0.05 * there[0]


def test_a_parameters_dtype_does_not_change_the_steps_of_others():
    """torch's default eps1 is that of the first parameter's dtype, for all the group."""

    def moved(optimizer, dtypes):
        params = [nn.Parameter(values(8, 6, seed=i).to(dtype)) for i, dtype in enumerate(dtypes)]
        for param in params:
            param.grad = 1e-5 * torch.ones_like(param)
        optimizer(params).step()
        return (params[-1].detach() - values(8, 6, seed=len(params) - 1)).abs().max().item()

    mixed, alone = [torch.bfloat16, torch.float32], [torch.float32, torch.float32]
    assert moved(torch.optim.Adafactor, mixed) < 0.1 * moved(torch.optim.Adafactor, alone)
    assert moved(TorchAdafactor, mixed) == moved(TorchAdafactor, alone)


def test_second_moments_of_bfloat16_parameters_do_not_stall():
    """After 3000 steps a new square has a weight of 0.0017, which bfloat16 state of torch rounds away for ever."""

    def second_moment(optimizer, key):
        param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = optimizer([param])
        optimizer.load_state_dict(
            {
                "state": {0: {"step": torch.tensor(3000.0), "variance": torch.ones(4, dtype=torch.bfloat16)}},
                "param_groups": [{**torch.optim.Adafactor([param]).param_groups[0], "params": [0]}],
            }
        )
        for _ in range(100):
            param.grad = torch.full_like(param, 0.1)
            optimizer.step()
        return optimizer.state[param][key][0].item()

    assert second_moment(torch.optim.Adafactor, "variance") == 1.0
    weights = [step**-0.8 for step in range(3001, 3101)]
    expected = 1.0
    for weight in weights:
        expected += weight * (0.01 - expected)
    assert second_moment(TorchAdafactor, "exp_avg_sq") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ours
def test_loading_leaves_second_moments_in_float32(optimizer, dtype):
    """torch casts state to the parameter's dtype when it loads, and transformers and CAME let it."""
    params = [nn.Parameter(values(6, 5, seed=0).to(dtype))]
    optimizers = [optimizer(params) for _ in range(2)]
    params[0].grad = 1e-3 * values(6, 5, seed=1).to(dtype)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert_same_states(states_of(optimizers[1], params), states_of(optimizers[0], params))


def test_loading_loses_second_moments_in_transformers():
    param = nn.Parameter(torch.ones(6, 5, dtype=torch.float16))
    param.grad = torch.full_like(param, 1e-4)
    optimizer = transformers.Adafactor([param])
    optimizer.step()
    assert (optimizer.state[param]["exp_avg_sq_row"] > 0).all()
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.state[param]["exp_avg_sq_row"] == 0).all()


def test_a_closure_may_call_backward():
    """transformers' step runs it without gradients."""

    def step(optimizer):
        param = nn.Parameter(torch.ones(3, 2))
        optimizer = optimizer([param])

        def closure():
            loss = param.square().sum()
            loss.backward()
            return loss

        return optimizer.step(closure)

    with pytest.raises(RuntimeError, match="does not require grad"):
        step(transformers.Adafactor)
    for optimizer in OURS:
        assert step(optimizer).item() == 6.0


def one_inf(optimizer, **options):
    """(parameters, optimizer) after a step in which one gradient element is Inf, and the parameters before it."""
    params = make_params(names=("vector", "matrix", "experts"))
    optimizer = optimizer(params, **options)
    take_steps(optimizer, params, 2)
    before = copies(params)
    for i, param in enumerate(params):
        param.grad = values(*param.shape, seed=i)
    params[1].grad[2, 3] = float("inf")
    optimizer.step()
    return params, optimizer, before


@pytest.mark.parametrize("optimizer", [transformers.Adafactor, torch.optim.Adafactor, PackageCAME])
def test_one_inf_poisons_parameter_and_state_of_peers(optimizer):
    params, optimizer, _ = one_inf(optimizer, **({"lr": 1e-3} if optimizer is PackageCAME else {}))
    assert params[1].isnan().any()
    take_steps(optimizer, params, 1)
    assert params[1].isnan().sum() > 10


@ours
def test_one_inf_stops_one_tensor_for_one_step(optimizer):
    params, optimizer, before = one_inf(optimizer)
    assert_same_bits(params[1:2], before[1:2])
    assert not torch.equal(params[0], before[0])
    assert not torch.equal(params[2], before[2])
    take_steps(optimizer, params, 1)
    assert not torch.equal(params[1], before[1])
    assert all(p.isfinite().all() for p in params)
    assert all(v.isfinite().all() for p in params for k, v in optimizer.state[p].items() if k != "uid")


@pytest.mark.parametrize("eps1", [None, 0.0])
@ours
def test_zero_gradients_move_nothing_and_leave_finite_state(optimizer, eps1):
    """Also without an eps1, which then is all that keeps 0 from being divided by 0; the next gradient counts."""
    options = {} if eps1 is None else {"eps": (eps1, 1e-16 if optimizer is CAME else 1e-3)}
    params, starts = (
        make_params(names=("vector", "matrix", "one_column")),
        make_params(names=("vector", "matrix", "one_column")),
    )
    optimizer = optimizer(params, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same_bits(params, starts)
    assert all(v.isfinite().all() for p in params for k, v in optimizer.state[p].items() if k != "uid")
    take_steps(optimizer, params, 1)
    assert all(p.isfinite().all() for p in params)
    assert all(not torch.equal(p, q) for p, q in zip(params, starts, strict=True))


@ours
def test_rows_without_gradient_stay(optimizer):
    """As of words that do not occur: their squares are 0 in a matrix where others are not."""
    param = nn.Parameter(values(6, 5, seed=0))
    start = param.detach().clone()
    optimizer = optimizer([param])
    for step in range(3):
        param.grad = values(6, 5, seed=step + 1)
        param.grad[2] = 0
        optimizer.step()
    assert_same_bits([param[2]], [start[2]])
    assert param.isfinite().all()
    assert (param != start)[[0, 1, 3, 4, 5]].all()


def test_steps_do_not_depend_on_the_size_of_gradients():
    """Down to 1e-12, whose squares are 1e6 times eps1. torch's rule, whose eps1 is larger, freezes below 1e-7."""
    for optimizer in (Adafactor, AdaLomo, CAME):
        sizes = [displacement(optimizer, scale, torch.float32) for scale in (1.0, 1e-12)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
    for optimizer in (TorchAdafactor, torch.optim.Adafactor):
        assert displacement(optimizer, 1e-12, torch.float32) < 1e-3 * displacement(optimizer, 1.0, torch.float32)


@pytest.mark.filterwarnings("ignore:Detected call")
def test_a_schedule_may_ask_before_there_is_state():
    """As when the first parameter has a gradient, and the scheduler is stepped before the optimizer."""

    def schedule(optimizer):
        param = nn.Parameter(torch.ones(3, 2))
        optimizer = optimizer([param])
        scheduler = AdafactorSchedule(optimizer)
        param.grad = torch.ones_like(param)
        scheduler.step()
        optimizer.step()
        return scheduler.get_last_lr()

    with pytest.raises(KeyError):
        schedule(transformers.Adafactor)
    assert schedule(Adafactor) == pytest.approx([1e-2])
