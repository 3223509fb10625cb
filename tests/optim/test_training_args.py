"""APOLLO from transformers' names of its options, alone and as the optimizer of a Trainer's arguments."""

import pytest
import torch
from torch import nn

from lowmem_optim import apollo_from_training_args
from optim.tensors import assert_same_bits, copies


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(12, 12)
        self.mlp = nn.Linear(12, 20, bias=False)
        self.norm = nn.LayerNorm(12)


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def projected(model, optimizer):
    names = {param: name for name, param in model.named_parameters()}
    optimizer.init_state()
    return {names[param] for param, state in optimizer.state.items() if "update_norm" in state}


@pytest.mark.parametrize(("targets", "expected"), [
    (["attn"], {"layers.0.attn.weight", "layers.1.attn.weight"}),
    (["attn", "layers.1.mlp"], {"layers.0.attn.weight", "layers.1.attn.weight", "layers.1.mlp.weight"}),
    (r"layers\.0\..*", {"layers.0.attn.weight", "layers.0.mlp.weight"}),
    ("all-linear", {"layers.0.attn.weight", "layers.1.attn.weight", "layers.0.mlp.weight", "layers.1.mlp.weight",
                    "head.weight"}),
])  # fmt: skip
def test_targets(targets, expected):
    model = Model()
    assert projected(model, apollo_from_training_args(model, optim_target_modules=targets)) == expected


def test_every_parameter_is_in_one_group_with_its_name_and_decay():
    model = Model(tied=True)
    model.layers[0].mlp.weight.requires_grad_(False)
    optimizer = apollo_from_training_args(model, optim_target_modules=["attn"], weight_decay=0.1, learning_rate=3e-4)
    decay = {
        name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]
    }  # fmt: skip
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    assert decay == {
        name: 0.1 if param.ndim == 2 else 0.0 for name, param in model.named_parameters() if param.requires_grad
    }
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert "embed.weight" not in projected(model, optimizer)


def test_options_are_read():
    optimizer = apollo_from_training_args(
        Model(), optim_target_modules=["mlp"], adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
        optim_args="rank=1, scale=128,scale_type=tensor,update_proj_gap=50,proj=random, proj_type=left,disable_nl=true",
        seed=7,
    )  # fmt: skip
    expected = {
        "rank": 1, "scale": 128.0, "scale_type": "tensor", "update_proj_gap": 50, "proj_type": "left",
        "disable_nl": True, "betas": (0.8, 0.95), "eps": 1e-7, "fallback_betas": (0.8, 0.95), "fallback_eps": 1e-7,
        "seed": 7,
    }  # fmt: skip
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected
    plain = apollo_from_training_args(Model(), optim_target_modules=["mlp"]).param_groups[0]
    assert (plain["rank"], plain["update_proj_gap"], plain["scale"], plain["scale_type"]) == (128, 200, 1.0, "channel")


@pytest.mark.parametrize(("options", "message"), [
    (dict(optim_args="rnak=4"), "optim_args has 'rnak=4'; allowed: key=value with keys rank, "),
    (dict(optim_args="scale_front=True"), "optim_args has 'scale_front=True'; allowed: key=value with keys rank, "),
    (dict(optim_args="rank"), "optim_args has 'rank'; allowed: key=value"),
    (dict(optim_args="rank=four"), "optim_args has 'rank=four'; allowed: a value like rank=128"),
    (dict(optim_args="disable_nl=maybe"), "allowed: a value like disable_nl=False"),
    (dict(optim_args="proj=svd"), "allowed: proj=random"),
    (dict(optim_args="rank=0"), "rank is 0; allowed: an integer >= 1"),
    (dict(optim_target_modules=["query"]), r"optim_target_modules is \['query'\]; allowed: what matches the name"),
    (dict(optim_target_modules="attn"), "optim_target_modules is 'attn'; allowed: "),
    (dict(weight_decay=-1.0), "weight_decay is -1.0; allowed: "),
])  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        apollo_from_training_args(Model(), **{"optim_target_modules": ["attn"], **options})


def test_a_step_decays_what_the_groups_say():
    """With gradients of zeros, only decay moves anything; the Trainer's own APOLLO has none."""
    model = Model()
    optimizer = apollo_from_training_args(model, optim_target_modules=["attn"], weight_decay=0.5, learning_rate=0.1)
    before = copies(model.parameters())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = [p * (1 - 0.05) if p.ndim == 2 else p for p in before]
    torch.testing.assert_close([*model.parameters()], expected, check_dtype=False)
    assert_same_bits([p for p in model.parameters() if p.ndim < 2], [nn.Parameter(p) for p in before if p.ndim < 2])
