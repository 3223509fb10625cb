"""Which parameters get an optimizer's own rule and which its fallback, at what rate, and with what state."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowmem_kernels.elementwise import scaled_update_
from lowmem_optim import SWAN, Adafactor, AdamW, SinkGD, split_params
from lowmem_optim.routed import RoutedOptimizer
from optim.every import both_dtypes
from optim.tensors import (
    Unchanged,
    assert_same_bits,
    assert_same_states,
    copies,
    make_named_params,
    make_params,
    same_bits,
    set_gradients,
    states_of,
    take_steps,
)

SCALE = 0.25
FALLBACKS = ("adamw", "adafactor", "table")
each_fallback = pytest.mark.parametrize("fallback", FALLBACKS)


class MatrixDescent(RoutedOptimizer):
    """Gradient descent for matrices: ``p -= lr (g + weight_decay p)``."""

    def __init__(self, params, lr=0.5, weight_decay=0.0, **options):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, options)

    def fallback_scale(self, group):
        return SCALE

    def new_matrix_state(self, param, group):
        return {}

    def update_matrices(self, bucket):
        group = bucket.group
        scaled_update_(
            bucket.params,
            bucket.grads,
            bucket.state("step"),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            **bucket.options(),
        )


def own_rule(params, **options):
    """By name, whether a parameter has taken a step of gradient descent."""
    named = make_named_params(names=params)
    starts = copies(named.values())
    optimizer = MatrixDescent([{"params": list(named.items()), **options}])
    take_steps(optimizer, list(named.values()), 1)
    return {
        name: same_bits(param, start - 0.5 * param.grad)
        for (name, param), start in zip(named.items(), starts, strict=True)
    }


ALL = ("scalar", "vector", "matrix", "one_row", "one_column", "conv_channels_last", "experts", "transposed", "strided")
TWO_DIMENSIONS = {"matrix", "one_row", "one_column", "transposed", "strided"}
MORE = {"conv_channels_last", "experts"}


@pytest.mark.parametrize("role", [None, "matrix"])
@pytest.mark.parametrize("stacks", [None, "batched", "conv"])
def test_what_is_a_matrix_depends_on_dimensions(role, stacks):
    """Without a role and with that of a matrix alike."""
    expected = TWO_DIMENSIONS if stacks is None else TWO_DIMENSIONS | MORE
    assert {name for name, own in own_rule(ALL, role=role, stacks=stacks).items() if own} == expected


@pytest.mark.parametrize("role", ["vector", "embedding", "head"])
def test_other_roles_get_the_fallback_whatever_their_shape(role):
    assert not any(own_rule(ALL, role=role, stacks="batched").values())


def test_roles_differ_from_group_to_group():
    params = make_params(names=("matrix", "strided"))
    starts = copies(params)
    optimizer = MatrixDescent([{"params": params[:1], "role": "embedding"}, {"params": params[1:]}])
    take_steps(optimizer, params, 1)
    assert optimizer.state[params[0]].keys() == {"step", "uid", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[params[1]].keys() == {"step", "uid"}
    assert same_bits(params[1], starts[1] - 0.5 * params[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_adamw(dtype):
    options = {"weight_decay": 0.1, "seed": 5}
    params, others = make_params(dtype), make_params(dtype)
    optimizer = MatrixDescent(params, lr=0.04, role="vector", fallback_betas=(0.8, 0.95), fallback_eps=1e-4, **options)
    other = AdamW(others, lr=0.04 * SCALE, betas=(0.8, 0.95), eps=1e-4, **options)
    take_steps(optimizer, params, 4)
    take_steps(other, others, 4)
    assert_same_bits(params, others)
    assert_same_states(states_of(optimizer, params), states_of(other, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_is_adafactor_in_units_of_the_parameter(dtype):
    options = {"weight_decay": 0.1, "seed": 5}
    params, others = make_params(dtype), make_params(dtype)
    optimizer = MatrixDescent(params, lr=0.04, role="vector", fallback="adafactor", **options)
    other = Adafactor(others, lr=0.04 * SCALE, relative_step=False, scale_parameter=False, **options)
    take_steps(optimizer, params, 4)
    take_steps(other, others, 4)
    assert_same_bits(params, others)
    assert_same_states(states_of(optimizer, params), states_of(other, others))


def table(params, grads, lr, weight_decay):
    """DeepSeek-V4.1's update of a table, in float64: literally, half-step by half-step, and for one 2-D parameter."""
    p, m = params, 0 * params
    for g in grads:
        m = 0.9 * m + g
        x = 0.9 * m + g
        norms = np.sqrt((x**2).sum(1))
        x = np.where((norms < 1e-3 * norms.mean())[:, None], 0, x)
        for half_step in range(1, 12):
            axis = half_step % 2
            norm = np.sqrt((x**2).mean(axis, keepdims=True))
            x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
        p = p - lr * (0.18 * x + weight_decay * p)
    return p, m


def test_table_follows_its_oracle():
    """With a row whose gradient is below the threshold, and one that has none."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(9, 5))
    optimizer = MatrixDescent([param], lr=0.04, weight_decay=0.1, role="embedding", fallback="table")
    start, grads = param.detach().double().numpy(), []
    for _ in range(5):
        param.grad = torch.randn(9, 5)
        param.grad[3] = 0
        param.grad[4] *= 1e-5
        grads.append(param.grad.double().numpy())
        optimizer.step()
    expected, momentum = table(start, grads, 0.04 * SCALE, 0.1)
    torch.testing.assert_close(param.detach().double(), torch.as_tensor(expected), rtol=0, atol=2e-6)
    state = optimizer.state[param]
    assert state.keys() == {"step", "uid", "exp_avg"}
    torch.testing.assert_close(state["exp_avg"].double(), torch.as_tensor(momentum), rtol=1e-5, atol=1e-6)
    # a vector is one row, of which 11 half-steps make the signs
    vector = nn.Parameter(torch.zeros(4))
    optimizer = MatrixDescent([vector], lr=0.04, fallback="table")
    vector.grad = torch.tensor([3.0, -0.1, 0.0, 2.0])
    optimizer.step()
    # of RMS 1: the zero's share is taken by the three others
    expected = -0.04 * SCALE * 0.18 * (4 / 3) ** 0.5 * torch.tensor([1.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(vector.detach(), expected)


EXPECTED_STATE = {
    "adamw": lambda shape: {"exp_avg": shape, "exp_avg_sq": shape},
    "adafactor": lambda shape: (
        {"exp_avg_sq": shape}
        if len(shape) < 2
        else {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
    ),
    "table": lambda shape: {"exp_avg": shape},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_fallback
def test_state_is_that_of_the_rule_in_float32(fallback, dtype):
    for made_by in ("step", "init_state"):
        params = make_params(dtype)
        optimizer = MatrixDescent(params, fallback=fallback)
        if made_by == "step":
            take_steps(optimizer, params, 1)
        else:
            optimizer.init_state()
        for param in params:
            shape = tuple(param.shape)
            state = {k: v for k, v in optimizer.state[param].items() if k not in ("step", "uid")}
            expected = {} if param.ndim == 2 else EXPECTED_STATE[fallback](shape)
            assert {k: tuple(v.shape) for k, v in state.items()} == expected
            assert all(v.dtype is torch.float32 and v.is_contiguous() for v in state.values())


@each_fallback
def test_resuming_equals_not_stopping(fallback):
    """Roles, and the lr that a fallback_lr goes with, come from the checkpoint, after a trip through a file."""

    def make(params, **options):
        return MatrixDescent(
            [{"params": params[:4], "role": "head", **options}, {"params": params[4:], "stacks": "conv"}],
            fallback=fallback,
            **options,
        )

    params = make_params(torch.bfloat16)
    optimizer = make(params, fallback_lr=0.03)
    take_steps(optimizer, params, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = [nn.Parameter(p) for p in copies(params)]
    resumed = MatrixDescent([{"params": again[:4]}, {"params": again[4:]}], lr=7.0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    take_steps(optimizer, params, 3, first=3)
    take_steps(resumed, again, 3, first=3)
    assert_same_bits(again, params)
    assert_same_states(states_of(resumed, again), states_of(optimizer, params))


def test_state_of_another_fallback_is_refused():
    params = make_params(names=("vector",))
    optimizer = MatrixDescent(params)
    take_steps(optimizer, params, 1)
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["fallback"] = "adafactor"
    with (
        Unchanged(optimizer),
        pytest.raises(ValueError, match=r"parameter 0 has keys .*allowed: \['exp_avg_sq', 'step"),
    ):
        optimizer.load_state_dict(checkpoint)


def rates(schedule, steps=6, **options):
    """How far one element goes in each step: with equal gradients, a step of Adam is its rate."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = MatrixDescent([param], fallback_eps=1e-30, **options)
    scheduler = schedule(optimizer)
    moves = []
    for _ in range(steps):
        before = param.item()
        param.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        moves.append(before - param.item())
    return moves


SCHEDULES = {
    "none": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 4)),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10, cycle_momentum=False),
}


@pytest.mark.parametrize("wrap_lr", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_act_on_the_fallback_as_on_lr(name, wrap_lr):
    """Where fallback_lr is given, it is the rate wherever lr is what it was at construction."""
    seen = []
    probe = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = SCHEDULES[name](probe)
    for _ in range(6):
        seen.append(probe.param_groups[0]["lr"])
        probe.step()
        scheduler.step()
    for fallback_lr, ratio in ((None, SCALE), (0.125, 0.25), (2.0, 4.0)):
        expected = torch.tensor([ratio * x for x in seen])
        actual = torch.tensor(rates(SCHEDULES[name], lr=wrap_lr(0.5), fallback_lr=fallback_lr))
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=0)


def test_a_group_has_a_fallback_lr_and_an_lr_of_its_own():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "lr": 0.1}]
    optimizer = MatrixDescent(groups, lr=0.5, fallback_lr=0.02, fallback_eps=1e-30)
    optimizer.add_param_group({"params": params[2:], "lr": 0.1, "fallback_lr": 0.04})
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    for param in params:
        param.grad = torch.ones(1)
    optimizer.step()
    torch.testing.assert_close(torch.cat(params).detach(), -torch.tensor([0.01, 0.01, 0.02]))


def test_capturable_fallback_reads_lr_from_its_tensor():
    params, others = ([nn.Parameter(torch.ones(5))] for _ in range(2))
    optimizer = MatrixDescent(params, lr=0.5, fallback_lr=0.125, capturable=True)
    plain = MatrixDescent(others, lr=0.5, fallback_lr=0.125)
    for lr in (0.5, 0.25):
        optimizer.param_groups[0]["lr"].fill_(lr)
        plain.param_groups[0]["lr"] = lr
        take_steps(optimizer, params, 1)
        take_steps(plain, others, 1)
    assert_same_bits(params, others)


@each_fallback
def test_decay_is_multiplied_by_the_rule_s_own_rate(fallback):
    params = make_params(names=("vector", "matrix"))
    starts = copies(params)
    optimizer = MatrixDescent(params, lr=0.1, weight_decay=0.3, fallback=fallback)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), starts[0] * (1 - 0.1 * SCALE * 0.3), rtol=2e-7, atol=0)
    torch.testing.assert_close(params[1].detach(), starts[1] * (1 - 0.1 * 0.3), rtol=2e-7, atol=0)


@each_fallback
def test_rules_do_not_share_buckets(fallback):
    params = make_params(names=ALL)
    optimizer = MatrixDescent(params, fallback=fallback)
    take_steps(optimizer, params, 1)
    rules = {bucket.rule: {*map(id, bucket.params)} for bucket in optimizer._buckets()}
    matrices = {id(p) for p in params if p.ndim == 2}
    assert rules == {"own": matrices, fallback: {id(p) for p in params} - matrices}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("role", "matrices"),
        ("role", 1),
        ("stacks", "experts"),
        ("stacks", True),
        ("fallback", "sgd"),
        ("fallback", None),
        ("fallback_lr", -1.0),
        ("fallback_lr", "1e-3"),
        ("fallback_betas", (0.9, 1.0)),
        ("fallback_betas", 0.9),
        ("fallback_eps", 0.0),
        ("fallback_eps", float("nan")),
    ],
)
def test_wrong_values_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\[\d\])? is .*; allowed: "):
        MatrixDescent(make_params(names=("matrix",)), **{name: value})
    optimizer = MatrixDescent(make_params(names=("matrix",)))
    group = {"params": make_params(names=("vector",)), name: value}
    with Unchanged(optimizer), pytest.raises(ValueError, match=rf"^{name}(\[\d\])? is .*; allowed: "):
        optimizer.add_param_group(group)


def test_a_fallback_lr_needs_an_lr():
    with pytest.raises(ValueError, match=r"^lr is 0\.0; allowed: > 0, since fallback_lr goes with it"):
        MatrixDescent(make_params(names=("matrix",)), lr=0.0, fallback_lr=1e-3)


@pytest.mark.parametrize(("misspelled", "meant"), [("fallback_beta", "fallback_betas"), ("roles", "role")])
def test_misspelled_options_are_refused(misspelled, meant):
    with pytest.raises(TypeError, match=f"unknown option '{misspelled}'; did you mean '{meant}'?"):
        MatrixDescent([{"params": make_params(names=("matrix",)), misspelled: 0}])


@pytest.mark.parametrize("make", [SinkGD, SWAN])
def test_embeddings_and_the_head_get_adamw_at_lr_times_scale(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 4), nn.Linear(4, 12))
    optimizer = make(split_params(model), lr=0.1, weight_decay=0.3)
    others = [nn.Parameter(p) for p in copies([model[0].weight, model[2].weight])]
    adamw = AdamW(others, lr=0.1 * 0.05, weight_decay=0.3)
    for step in range(3):
        set_gradients(list(model.parameters()), step)
        for param, other in zip((model[0].weight, model[2].weight), others, strict=True):
            other.grad = param.grad
        optimizer.step()
        adamw.step()
    assert_same_bits([model[0].weight, model[2].weight], others)
    assert optimizer.state[model[1].weight].keys() == {"step", "uid"}


@both_dtypes
@pytest.mark.parametrize("make", [SinkGD, SWAN])
@pytest.mark.parametrize("exponent", [-30, 30])
def test_a_scale_of_all_gradients_changes_no_bit_of_a_matrix(dtype, make, exponent):
    """So that clipping their norm and scaling the loss do nothing; a power of two changes no digit."""
    params, others = make_params(dtype, ("matrix", "strided")), make_params(dtype, ("matrix", "strided"))
    first, second = make(params), make(others)
    for step in range(3):
        set_gradients(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad * 2.0**exponent
        first.step()
        second.step()
    assert_same_bits(params, others)
