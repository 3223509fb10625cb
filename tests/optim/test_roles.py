"""Which role `split_params` gives to which parameter, and how it says so."""

import pytest
import torch
import transformers
from torch import nn

from lowmem_optim import AdamW, split_params


class Experts(nn.Module):
    """Stacked matrices, and a router to choose among them."""

    def __init__(self, count, dim):
        super().__init__()
        self.router = nn.Linear(dim, count, bias=False)
        self.up = nn.Parameter(torch.zeros(count, 2 * dim, dim))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.mixture = Experts(2, dim)


class Llama(nn.Module):
    """As Llama: the output layer is the last of all, and has as many outputs as the embedding has rows."""

    def __init__(self, dim=4, rows=12, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        self.blocks = nn.ModuleList([Block(dim)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, rows, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def roles_of(model, roles=None):
    return {assignment.name: assignment.role for assignment in split_params(model, roles).assignments}


LLAMA = {
    "embedding.weight": "embedding",
    "blocks.0.norm.weight": "vector",
    "blocks.0.qkv.weight": "matrix",
    "blocks.0.qkv.bias": "vector",
    "blocks.0.mixture.up": "matrix",
    "blocks.0.mixture.router.weight": "matrix",
    "norm.weight": "vector",
    "norm.bias": "vector",
    "head.weight": "head",
}


def test_roles_follow_the_types_of_modules():
    assert roles_of(Llama()) == LLAMA


def test_groups_have_each_parameter_once_with_its_name():
    model = Llama()
    groups = split_params(model)
    assert [group["role"] for group in groups] == ["matrix", "embedding", "head", "vector"]
    named = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
    assert {name: id(p) for name, p in named} == {name: id(p) for name, p in model.named_parameters()}
    assert len(named) == len(LLAMA)
    for group in groups:
        assert {LLAMA[name] for name in group["param_names"]} == {group["role"]}


def test_a_tied_weight_is_one_embedding():
    groups = split_params(Llama(tied=True))
    expected = {name: role for name, role in LLAMA.items() if name != "head.weight"}
    assert {a.name: a.role for a in groups.assignments} == expected
    assert groups.assignments[0].reason == "Embedding, tied to head.weight"
    assert [g["role"] for g in groups] == ["matrix", "embedding", "vector"]


def test_a_linear_layer_that_is_not_last_or_not_as_wide_is_a_matrix():
    """12 outputs in the middle, as many as the embedding has rows, are a coincidence."""
    model = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 12), nn.Linear(12, 5))
    assert roles_of(model)["1.weight"] == "matrix"
    assert roles_of(model)["2.weight"] == "matrix"


def test_modules_of_other_kinds():
    model = nn.ModuleDict(
        {
            "bag": nn.EmbeddingBag(7, 3),
            "conv": nn.Conv2d(3, 5, 2),
            "image_norm": nn.LayerNorm([5, 2, 2]),
            "batch_norm": nn.BatchNorm2d(5),
        }
    )
    model.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    assert roles_of(model) == {
        "gain": "vector",
        "bag.weight": "embedding",
        "conv.weight": "matrix",
        "conv.bias": "vector",
        "image_norm.weight": "vector",
        "image_norm.bias": "vector",
        "batch_norm.weight": "vector",
        "batch_norm.bias": "vector",
    }


def test_patterns_win_over_types_and_later_ones_over_earlier_ones():
    roles = roles_of(Llama(), {"blocks.*.weight": "vector", "*.router.weight": "head", "head.*": "matrix"})
    changed = {name: role for name, role in roles.items() if role != LLAMA[name]}
    assert changed == {
        "blocks.0.qkv.weight": "vector",
        "blocks.0.mixture.router.weight": "head",
        "head.weight": "matrix",
    }


def test_a_pattern_may_match_the_other_name_of_a_tied_weight():
    assert roles_of(Llama(tied=True), {"head.weight": "head"})["embedding.weight"] == "head"


def test_frozen_parameters_are_left_out():
    model = Llama()
    model.embedding.requires_grad_(False)
    model.blocks.requires_grad_(False)
    assert set(roles_of(model, {"blocks.*": "vector"})) == {"norm.weight", "norm.bias", "head.weight"}


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"*.qkv.weight": "expert"},
            r"^roles\['\*.qkv.weight'\] is 'expert'; allowed: 'matrix', 'embedding', 'head', ",
        ),
        ({"head.weigth": "vector"}, r"^roles has 'head.weigth', which matches no parameter; allowed: .*head.weight"),
        ({"*.k_proj": "vector"}, r"^roles has '\*.k_proj', which matches no parameter; allowed: such as embedding"),
        ({"norm.*": "matrix"}, r"^roles\['norm.\*'\] is 'matrix' for norm.weight, of shape \(4,\); allowed: 'vector'"),
    ],
)
def test_bad_overrides_are_refused(roles, message):
    with pytest.raises(ValueError, match=message):
        split_params(Llama(), roles)


def test_printed_it_is_a_table(capsys):
    model = nn.Sequential(nn.Embedding(12, 4), nn.LayerNorm(4, bias=False), nn.Conv1d(4, 4, 3), nn.Linear(4, 12))
    print(split_params(model, {"2.weight": "vector"}))
    assert capsys.readouterr().out == (
        "name      shape      role       reason\n"
        "0.weight  12 x 4     embedding  Embedding\n"
        "1.weight  4          vector     LayerNorm, 1-D\n"
        "2.weight  4 x 4 x 3  vector     roles['2.weight']\n"
        "2.bias    4          vector     Conv1d, 1-D\n"
        "3.weight  12 x 4     head       Linear, output layer\n"
        "3.bias    12         vector     Linear, 1-D\n"
    )


@pytest.mark.parametrize("optimizer", [AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_any_optimizer_takes_the_groups(optimizer):
    model = Llama()
    groups = split_params(model)
    groups[0]["weight_decay"] = 0.5
    made = optimizer(groups, lr=0.1)
    assert [group["role"] for group in made.param_groups] == ["matrix", "embedding", "head", "vector"]
    assert made.param_groups[0]["weight_decay"] == 0.5
    assert made.param_groups[1]["param_names"] == ["embedding.weight"]


def tiny_llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **options
    )
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2(**options):
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, **options)
    return transformers.GPT2LMHeadModel(config)


def tiny_mixtral(**options):
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        **options,
    )
    return transformers.MixtralForCausalLM(config)


EMBEDDINGS = {
    tiny_llama: {"model.embed_tokens.weight"},
    tiny_gpt2: {"transformer.wte.weight", "transformer.wpe.weight"},
    tiny_mixtral: {"model.embed_tokens.weight"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", EMBEDDINGS, ids=lambda make: make.__name__)
def test_models_of_transformers(make, tied):
    model = make(tie_word_embeddings=tied)
    roles = roles_of(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert {name for name, role in roles.items() if role == "embedding"} == EMBEDDINGS[make]
    assert {name for name, role in roles.items() if role == "head"} == (set() if tied else {"lm_head.weight"})
    for name, param in model.named_parameters():
        assert (roles[name] == "vector") == (param.ndim < 2)


def test_wrapped_models_of_transformers():
    """As DistributedDataParallel and others do: the method that names the output layer is one level down."""
    wrapped = nn.ModuleDict({"module": tiny_llama(tie_word_embeddings=False)})
    assert roles_of(wrapped)["module.lm_head.weight"] == "head"


def test_conv1d_of_transformers_is_a_linear_layer():
    """Its weight is transposed: `nf` outputs are columns."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Embedding(12, 4), Conv1D(12, 4))
    assert tuple(model[1].weight.shape) == (4, 12)
    assert roles_of(model)["1.weight"] == "head"
