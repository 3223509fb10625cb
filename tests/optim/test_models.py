"""The shapes of real models, against the parameter counts that were published with them."""

import pytest

from lowmem_kernels.testing.models import MODELS, model_shapes, parameter_count

# tensors and parameters; those of 60M to 1B are GaLore's, whose training logs say 58.07M, 367.97M and 1339.08M
PUBLISHED = {
    "gpt2": (148, 124_439_808),
    "gpt2-xl": (580, 1_557_611_200),
    "llama-60m": (75, 58_073_600),
    "llama-350m": (219, 367_969_280),
    "llama-1b": (219, 1_339_082_752),
    "llama-7b": (291, 6_738_415_616),
    "llama-3-8b": (291, 8_030_261_248),
    "qwen3-8b": (399, 8_190_735_360),
    "mixtral-8x7b": (291, 46_702_792_704),
}


def test_every_model_has_a_published_count():
    assert MODELS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    shapes = model_shapes(name)
    assert (len(shapes), parameter_count(shapes)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_fewer_layers_are_a_part_of_the_model(name):
    whole, one, two = model_shapes(name), model_shapes(name, 1), model_shapes(name, 2)
    assert one.items() < two.items() < whole.items()
    per_layer = parameter_count(two) - parameter_count(one)
    assert parameter_count(whole) == parameter_count(one) + (MODELS[name].layers - 1) * per_layer


def test_grouped_queries_and_experts():
    llama, mixtral = model_shapes("llama-3-8b", 1), model_shapes("mixtral-8x7b", 1)
    assert llama["model.layers.0.self_attn.k_proj.weight"] == (1024, 4096)
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"] == (8, 28672, 4096)
    assert mixtral["model.layers.0.mlp.experts.down_proj"] == (8, 4096, 14336)


def test_names_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    import torch

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == model_shapes("llama-60m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-8b",), "model is 'llama-8b'; did you mean .*llama-3-8b"),
        (("bert",), "model is 'bert'; allowed: gpt2, gpt2-xl, llama-60m"),
        (("gpt2", 13), "layers is 13; this model allows 1 to 12"),
        (("gpt2", 0), "layers is 0; this model allows 1 to 12"),
    ],
)
def test_errors_name_value_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_shapes(*arguments)
