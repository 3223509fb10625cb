"""The model of `lowmem train`: what it must not see, how it encodes positions, and its size."""

import pytest
import torch

from lowmem_optim.cli.model import ByteModel, ModelConfig, rope_table, rotate

SMALL = ModelConfig.from_width(layers=2, dim=64, context=16)


def test_a_later_byte_does_not_change_earlier_logits():
    torch.manual_seed(0)
    model = ByteModel(SMALL)
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10] ^= 1
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:10] == 0).all()
    assert (difference[10:] > 0).all()


def test_a_shorter_sequence_has_the_same_logits():
    torch.manual_seed(0)
    model = ByteModel(SMALL)
    tokens = torch.randint(256, (1, 16))
    torch.testing.assert_close(model(tokens)[:, :7], model(tokens[:, :7]))


def test_rope_products_depend_on_distance_alone():
    torch.manual_seed(0)
    rope = rope_table(context=32, width=8)
    query, key = torch.randn(2, 8)
    turned_query, turned_key = (rotate(x.expand(32, 8), rope) for x in (query, key))
    products = turned_query @ turned_key.T
    for distance in (0, 1, 5):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=1e-5)
    assert (products[0, 0] - products[5, 0]).abs() > 1e-2
    torch.testing.assert_close(turned_query.norm(dim=1), query.norm().expand(32))


@pytest.mark.parametrize(("layers", "dim"), [(1, 32), (3, 96)])
def test_parameter_count(layers, dim):
    config = ModelConfig.from_width(layers, dim, context=8)
    assert config.parameters == sum(p.numel() for p in ByteModel(config).parameters())


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    tokens = torch.randint(256, (2, 8, 16))
    loss = ByteModel(SMALL).loss(tokens[0], tokens[1])
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = ByteModel(ModelConfig.from_width(layers=8, dim=128, context=8))
    assert model.blocks[0].mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mlp.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[0].attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_positions_survive_a_cast_to_bfloat16():
    exact = ByteModel(ModelConfig.from_width(layers=1, dim=32, context=128)).rope
    cast = ByteModel(ModelConfig.from_width(layers=1, dim=32, context=128)).bfloat16().rope
    torch.testing.assert_close(cast.float(), exact, atol=2**-8, rtol=0)


@pytest.mark.parametrize(("dim", "advice"), [(100, "try 96 or 128"), (8, "try 32")])
def test_width_must_hold_whole_heads(dim, advice):
    with pytest.raises(ValueError, match=f"{dim} is not a multiple of 32.*{advice}$"):
        ModelConfig.from_width(layers=1, dim=dim, context=8)
