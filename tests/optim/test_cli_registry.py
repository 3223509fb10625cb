"""How `lowmem train` finds optimizers by name and gives them options."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import lowmem_optim
from lowmem_optim.cli.defaults import DEFAULTS
from lowmem_optim.cli.model import ByteModel, ModelConfig
from lowmem_optim.cli.registry import choices, find, parse_options, require_taker
from optim.cases import exported


class Clipping(torch.optim.SGD):
    """Stands for an optimizer of this package."""

    def __init__(self, params, lr=0.25, clip_grad_norm=None):
        super().__init__(params, lr=lr)
        self.clip_grad_norm = clip_grad_norm


@pytest.fixture
def own_optimizer(monkeypatch):
    monkeypatch.setattr(lowmem_optim, "Clipping", Clipping, raising=False)
    monkeypatch.setattr(lowmem_optim, "helper", len, raising=False)
    monkeypatch.setattr(lowmem_optim, "__all__", ["Clipping", "helper"])


@pytest.mark.parametrize("name", ["torch.AdamW", "torch.adamw", "TORCH.ADAMW"])
def test_names_in_any_case(name):
    assert find(name).cls is torch.optim.AdamW
    assert find(name).name == "torch.AdamW"


@pytest.mark.usefixtures("own_optimizer")
def test_own_optimizers_need_no_prefix():
    assert find("clipping").cls is Clipping
    assert find("clipping").default.lr == 0.25
    assert "helper" not in choices()


def test_learning_rates_are_the_same_for_the_same_class_name():
    assert find("torch.sgd").default.lr == DEFAULTS["SGD"].lr
    assert find("torch.rprop").default.lr == 0.01  # not swept: the constructor's own


@pytest.mark.parametrize("name", sorted(name for name in choices() if name.startswith("torch.")))
def test_every_pytorch_optimizer_takes_a_step(name):
    model = nn.Linear(2, 2)
    optimizer = find(name).build(model, lr=1e-3, options={})
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.adamv", "no optimizer is named 'torch.adamv'; did you mean .*torch.AdamW"),
        ("zzz", "no optimizer is named 'zzz'; known: .*torch.Adagrad, .*torch.SGD"),
        ("torch.lbfgs", "torch.LBFGS cannot train this model: it evaluates the loss several times"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


def test_options_are_literals_or_text():
    options = parse_options(["betas=(0.9, 0.95)", "fused=True", "eps=1e-6", "momentum=half"], list(choices().values()))
    assert options == {"betas": (0.9, 0.95), "fused": True, "eps": 1e-6, "momentum": "half"}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("momentum", "'momentum' is not of the form key=value"),
        ("momentun=0.9", "'momentun' is not an argument of torch.SGD or torch.AdamW; did you mean momentum"),
        ("weight_decay=1", "'weight_decay' has an option of its own, --weight-decay"),
    ],
)
def test_bad_options(pair, message):
    with pytest.raises(ValueError, match=message):
        parse_options([pair], [find("torch.sgd"), find("torch.adamw")])


def test_an_option_needs_one_optimizer_that_takes_it():
    require_taker("momentum", [find("torch.adamw"), find("torch.sgd")])
    with pytest.raises(ValueError, match=r"'backend' is not an argument of torch\.SGD; known: dampening"):
        require_taker("backend", [find("torch.sgd")])


def test_build_gives_each_optimizer_only_what_it_takes():
    optimizer = find("torch.sgd").build(nn.Linear(2, 2), lr=0.5, options={"momentum": 0.9, "betas": (0.9, 0.95)})
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["lr"] == 0.5


def test_every_optimizer_of_this_package_takes_the_commands_schedule():
    for name in exported():
        choice = find(name)
        optimizer = choice.build(nn.Linear(2, 2), lr=choice.default.lr, options={})
        LambdaLR(optimizer, lambda step: 0.5)
        assert optimizer.param_groups[0]["lr"] == 0.5 * choice.default.lr


@pytest.mark.parametrize("name", ["sinkgd", "mngd"])
def test_optimizers_with_a_rule_for_matrices_are_told_the_roles(name):
    model = ByteModel(ModelConfig.from_width(layers=1, dim=32, context=8))
    optimizer = find(name).build(model, lr=0.02, options={"fallback": "adafactor"})
    roles = {group["role"]: group["param_names"] for group in optimizer.param_groups}
    assert roles["embedding"] == ["embedding.weight"]
    assert roles["head"] == ["head.weight"]
    assert [group["fallback"] for group in optimizer.param_groups] == ["adafactor"] * 4


@pytest.mark.parametrize("name", ["sinkgd", "mngd"])
def test_with_adafactor_for_the_rest_no_state_is_as_large_as_a_matrix(name):
    """Nor as an embedding: matrices have none, and embeddings and the head two factors."""
    model = ByteModel(ModelConfig.from_width(layers=1, dim=32, context=8))
    optimizer = find(name).build(model, lr=0.02, options={"fallback": "adafactor"})
    tokens = torch.arange(8).view(1, 8)
    model.loss(tokens, tokens).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        for param in group["params"]:
            sizes = [v.numel() for k, v in optimizer.state[param].items() if k not in ("step", "uid")]
            if group["role"] == "matrix":
                assert sizes == []
            elif param.ndim >= 2:
                assert sum(sizes) == sum(param.shape) < param.numel()


def test_build_names_the_optimizer_that_rejects_a_value():
    with pytest.raises(ValueError, match=r"torch.SGD\(lr=0.5, momentum=-1\): Invalid momentum"):
        find("torch.sgd").build(nn.Linear(2, 2), lr=0.5, options={"momentum": -1})


def test_sources_of_rates_say_what_was_measured():
    """Every figure of the committed sweeps, and the lowest of each optimizer is its default."""
    with (Path(__file__).parents[2] / "bench/results/train_rates.csv").open() as stream:
        rows = [*csv.DictReader(stream)]
    for row in rows:
        assert f"{row['validation_loss']}" in DEFAULTS[row["optimizer"]].source
    for name in ("CAME", "TorchAdafactor", "AdamMini"):
        best = min((row for row in rows if row["optimizer"] == name), key=lambda row: float(row["validation_loss"]))
        assert float(best["lr"]) == DEFAULTS[name].lr
