"""Checkpoints of other implementations load, and training carries on as it would have there."""

import copy

import pytest
import torch
import transformers
from came_pytorch import CAME as PackageCAME
from torch import nn

from lowmem_kernels.testing import assert_parity
from lowmem_optim import CAME, Adafactor, AdaLomo, TorchAdafactor
from optim.tensors import Unchanged, copies, make_params, set_gradients

#: torch divides by the number of elements, so that there has to be one
LAYOUTS = ("scalar", "vector", "matrix", "one_row", "one_column", "conv_channels_last", "experts", "transposed")
STEPS = 20
NAMES_OF_TORCH = {"exp_avg_sq_row": "row_var", "exp_avg_sq_col": "col_var", "exp_avg_sq": "variance"}


def hf(params, **options):
    return transformers.Adafactor(params, **{"weight_decay": 0.1, **options})


def hf_with_momentum(params):
    return hf(params, lr=1e-2, relative_step=False, beta1=0.9, clip_threshold=0.7, eps=(1e-12, 1e-2), decay_rate=-0.7)


def hf_warming_up(params):
    return hf(params, warmup_init=True, eps=(1e-30, 10.0))


def of_torch(params):
    return torch.optim.Adafactor(params, lr=2e-2, weight_decay=0.1, eps=(1e-3, 1e-2), d=1.5, beta2_decay=-0.7)


def of_torch_by_default(params):
    return torch.optim.Adafactor(params)


def of_torch_with_lr(params):
    return torch.optim.Adafactor(params, lr=1e-3, d=1.5, eps=(None, 2.0))


def of_came(params):
    return PackageCAME(params, lr=1e-3, betas=(0.8, 0.99, 0.995), eps=(1e-20, 1e-10), weight_decay=0.1)


PAIRS = [
    pytest.param(hf, Adafactor, id="transformers"),
    pytest.param(hf_with_momentum, Adafactor, id="transformers-momentum"),
    pytest.param(hf_warming_up, Adafactor, id="transformers-warmup"),
    pytest.param(of_torch, TorchAdafactor, id="torch"),
    pytest.param(of_torch_by_default, Adafactor, id="torch-to-transformers"),
    pytest.param(of_torch_with_lr, Adafactor, id="torch-lr-to-transformers"),
    pytest.param(of_came, CAME, id="came"),
]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


def trained(peer, dtype=torch.float32, layouts=LAYOUTS):
    params = make_params(dtype, layouts)
    optimizer = peer(params)
    train(optimizer, params, 5)
    return params, optimizer


def loaded(optimizer, params, checkpoint, **options):
    again = [nn.Parameter(p) for p in copies(params)]
    optimizer = optimizer(again, seed=17, **options)
    optimizer.load_state_dict(checkpoint)
    return again, optimizer


@pytest.mark.parametrize(("peer", "optimizer"), PAIRS)
def test_training_carries_on_as_the_peers(peer, optimizer):
    params, other = trained(peer)
    starts = copies(params)
    checkpoint = copy.deepcopy(other.state_dict())
    again, ours = loaded(optimizer, params, checkpoint)
    assert ours.param_groups[0]["seed"] == 17
    train(ours, again, STEPS, first=5)
    train(other, params, STEPS, first=5)
    for layout, p, q, start in zip(LAYOUTS, again, params, starts, strict=True):
        assert_parity(p.detach(), q.detach(), start, STEPS, layout)
        assert ours.state[p]["step"] == 5 + STEPS


@pytest.mark.parametrize(("peer", "optimizer"), PAIRS)
def test_states_and_the_options_that_we_know_are_taken(peer, optimizer):
    params, other = trained(peer)
    again, ours = loaded(optimizer, params, other.state_dict())
    for p, q in zip(again, params, strict=True):
        theirs = other.state[q]
        for key, value in ours.state[p].items():
            if key not in ("step", "uid"):
                expected = theirs.get(key, theirs.get(NAMES_OF_TORCH.get(key)))
                assert value.is_contiguous()
                assert torch.equal(value, expected.reshape(value.shape)), key
    group, own = other.param_groups[0], ours.param_groups[0]
    if optimizer is Adafactor and "beta2_decay" in group:
        expected = {"decay_rate": group["beta2_decay"], "clip_threshold": group["d"], "eps": (1e-30, group["eps"][1])}
        assert not {"beta2_decay", "d"} & own.keys()
    else:
        expected = group
    assert {key: own[key] for key in expected if key != "params"} == {
        key: value for key, value in expected.items() if key != "params"
    }


def test_bfloat16_second_moments_of_torch_become_float32():
    params, other = trained(of_torch, torch.bfloat16, ("vector", "matrix"))
    again, ours = loaded(TorchAdafactor, params, other.state_dict())
    for p, q in zip(again, params, strict=True):
        for key, value in ours.state[p].items():
            if key in NAMES_OF_TORCH:
                assert value.dtype is torch.float32
                assert torch.equal(value, other.state[q][NAMES_OF_TORCH[key]].float().view(value.shape))
    train(ours, again, 1, first=5)


def test_second_moments_of_transformers_in_bfloat16_become_float32():
    """As its own load_state_dict makes them; the next checkpoint then holds them."""
    params, other = trained(hf, torch.bfloat16, ("vector", "matrix"))
    other.load_state_dict(other.state_dict())
    _, ours = loaded(Adafactor, params, other.state_dict())
    states = [value for state in ours.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert {value.dtype for value in states} == {torch.float32}


def test_checkpoints_of_transformers_load_into_adalomo():
    """The rule is the same, with an lr; the options that it does not have are kept as unknown ones."""
    params, other = trained(lambda params: hf(params, lr=1e-2, relative_step=False))
    starts = copies(params)
    again, ours = loaded(AdaLomo, params, copy.deepcopy(other.state_dict()))
    train(ours, again, STEPS, first=5)
    train(other, params, STEPS, first=5)
    for p, q, start in zip(again, params, starts, strict=True):
        assert_parity(p.detach(), q.detach(), start, STEPS)


def test_a_learning_rate_of_torch_in_a_tensor_loads():
    params, other = trained(lambda params: torch.optim.Adafactor(params, lr=torch.tensor(2e-2)))
    _, ours = loaded(Adafactor, params, other.state_dict())
    assert ours.param_groups[0]["relative_step"] is False
    assert ours.param_groups[0]["lr"] == 2e-2


@pytest.mark.parametrize(
    ("peer", "optimizer", "message"),
    [
        (of_torch, CAME, r"has keys \['col_var', 'row_var', 'step'\]; allowed: \['exp_avg'"),
        (hf_with_momentum, AdaLomo, r"has keys \['exp_avg', .*; allowed: "),
        (of_came, Adafactor, r"has keys \['exp_avg', 'exp_avg_res_col', .*; allowed: "),
    ],
)
def test_what_does_not_fit_changes_nothing(peer, optimizer, message):
    params, other = trained(peer, layouts=("matrix",))
    ours = optimizer(params)
    with Unchanged(ours), pytest.raises(ValueError, match=message):
        ours.load_state_dict(other.state_dict())


def test_a_wrong_shape_of_torch_changes_nothing():
    params, other = trained(of_torch, layouts=("matrix",))
    checkpoint = other.state_dict()
    checkpoint["state"][0]["row_var"] = torch.zeros(13, 1)
    ours = TorchAdafactor(params)
    with Unchanged(ours), pytest.raises(ValueError, match=r"exp_avg_sq_row of parameter 0 is .*\(13, 1\); allowed: "):
        ours.load_state_dict(checkpoint)
