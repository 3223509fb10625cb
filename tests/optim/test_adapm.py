"""Which block gets which moments and what that costs, slices of parameters, and what AdaPM is at both ends."""

import io

import pytest
import torch
from torch import nn

from lowmem_kernels.testing.models import Architecture, model_shapes
from lowmem_optim import AdamMini, AdamW, AdaPM, split_params
from lowmem_optim.blocks import POLICY, kind_of
from lowmem_optim.cli.model import ByteModel, ModelConfig
from optim.calls import calls_in
from optim.tensors import (
    assert_same_bits,
    assert_same_states,
    copies,
    make_params,
    set_gradients,
    states_of,
    take_steps,
    values,
)

GPT2_XL = Architecture(50257, 1600, 6400, 48, 25, 25, tied=True, positions=1024)


def on_meta(shapes):
    return [(name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes.items()]


def bytes_of(optimizer):
    """(bytes of momentum, bytes of second moments, elements of parameters) from real state tensors."""
    optimizer.init_state()
    momentum = second = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            if key in ("uid", "step") or key.startswith("step."):
                continue
            size = value.numel() * value.element_size()
            momentum, second = (momentum, second + size) if key.startswith("exp_avg_sq") else (momentum + size, second)
    return momentum, second, sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def test_gpt2_xl_keeps_a_tenth_of_the_momentum_and_a_twentieth_of_the_state():
    """What the paper claims for GPT-2 1.5B: over 90 % of the momentum saved, up to 95 % of all state with Adam-mini."""
    momentum, second, elements = bytes_of(AdaPM(on_meta(GPT2_XL.shapes()), second_moment="adam-mini", head_dim=64))
    assert elements == 1_557_611_200
    assert momentum <= 0.10 * 4 * elements
    assert momentum + second <= 0.05 * 8 * elements
    momentum, second, _ = bytes_of(AdaPM(on_meta(GPT2_XL.shapes())))
    assert momentum <= 0.10 * 4 * elements
    assert second == 4 * elements


@pytest.mark.parametrize(
    ("model", "rank", "momentum_percent"),
    [
        ("gpt2", 8, 6.52), ("gpt2", 16, 7.35), ("gpt2", 64, 12.3),
        ("llama-60m", 8, 4.9), ("llama-60m", 16, 6.2), ("llama-60m", 32, 8.8), ("llama-60m", 64, 14.0),
        ("llama-350m", 16, 8.6), ("llama-1b", 16, 8.4), ("llama-3-8b", 16, 2.11), ("llama-3-8b", 64, 3.42),
    ],
)  # fmt: skip
def test_state_is_what_was_computed_by_hand(model, rank, momentum_percent):
    """V's share of all parameters, and r (m + n) for queries, keys, MLPs and the head; biases and norms are 0.1 %."""
    momentum, second, elements = bytes_of(AdaPM(on_meta(model_shapes(model)), rank=rank, second_moment="adam-mini"))
    assert 100 * momentum / (4 * elements) == pytest.approx(momentum_percent, abs=0.15)
    assert second <= 0.002 * 4 * elements
    factored = bytes_of(AdaPM(on_meta(model_shapes(model)), rank=rank, second_moment="factored"))
    assert factored[0] == momentum
    assert factored[1] <= 0.005 * 4 * elements


KINDS = {
    # GPT-2
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.h.0.attn.c_attn.weight": "query, key, value",
    "transformer.h.0.attn.c_proj.weight": "attention output",
    "transformer.h.0.mlp.c_fc.weight": "mlp",
    "transformer.h.0.mlp.c_proj.weight": "mlp",
    "lm_head.weight": "head",
    # Llama, Mistral, Qwen, Phi, Mixtral
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.self_attn.q_proj.weight": "query",
    "model.layers.0.self_attn.k_proj.weight": "key",
    "model.layers.0.self_attn.v_proj.weight": "value",
    "model.layers.0.self_attn.o_proj.weight": "attention output",
    "model.layers.0.self_attn.qkv_proj.weight": "query, key, value",
    "model.layers.0.mlp.gate_proj.weight": "mlp",
    "model.layers.0.mlp.gate_up_proj.weight": "gate, up",
    "model.layers.0.mlp.experts.gate_up_proj": "gate, up",
    "model.layers.0.mlp.experts.down_proj": "mlp",
    "model.layers.0.block_sparse_moe.experts.3.w1.weight": "mlp",
    "layers.0.attention.wq.weight": "query",
    "layers.0.attention.wo.weight": "attention output",
    "layers.0.feed_forward.w2.weight": "mlp",
    "output.weight": "head",
    # T5
    "shared.weight": "embedding",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "query",
    "encoder.block.0.layer.0.SelfAttention.o.weight": "attention output",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
    "decoder.block.0.layer.1.EncDecAttention.v.weight": "value",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "mlp",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "mlp",
    # OPT, BERT, torch
    "model.decoder.layers.0.self_attn.out_proj.weight": "attention output",
    "model.decoder.layers.0.fc1.weight": "mlp",
    "encoder.layer.0.attention.self.value.weight": "value",
    "encoder.layer.0.attention.output.dense.weight": "attention output",
    "encoder.layer.0.output.dense.weight": "mlp",
    "layers.0.self_attn.in_proj_weight": "query, key, value",
    # this package's
    "blocks.0.attention.qkv.weight": "query, key, value",
    "blocks.0.attention.out.weight": "attention output",
    "blocks.0.mlp.out.weight": "mlp",
    # what nobody knows
    "conv1.weight": "unknown",
    "q.weight": "unknown",
    "": "unknown",
    "0": "unknown",
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_by_names(name):
    assert kind_of(name, 2) == KINDS[name]


def test_kinds_of_vectors_and_roles():
    assert kind_of("model.layers.0.self_attn.q_proj.bias", 1) == "bias"
    assert kind_of("model.norm.weight", 1) == "vector"
    assert kind_of("anything", 2, "embedding") == "embedding"
    assert kind_of("model.layers.0.self_attn.q_proj.weight", 2, "vector") == "vector"
    assert kind_of("model.layers.0.self_attn.q_proj.weight", 2, "matrix") == "query"
    assert set(KINDS.values()) - {"query, key, value", "gate, up"} <= POLICY.keys()


def momenta(optimizer):
    """{name: [(momentum, second moment, place)]}."""
    found = {}
    for group in optimizer.param_groups:
        for place, name in enumerate(group["param_names"]):
            parts = optimizer.parts_of(group["params"][place], group, place)
            found[name] = [(part.rule, part.where) for part in parts]
    return found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((96, 32), [("lowrank", (0, 0, 32)), ("lowrank", (0, 32, 32)), ("full", (0, 64, 32))]),
        ((32, 96), [("lowrank", (1, 0, 32)), ("lowrank", (1, 32, 32)), ("full", (1, 64, 32))]),
        ((48, 32), [("lowrank", (0, 0, 32)), ("lowrank", (0, 32, 8)), ("full", (0, 40, 8))]),
        ((32, 32), [("full", None)]),
        ((97, 32), [("full", None)]),
    ],
)
def test_fused_projections_are_cut_along_the_long_side(shape, expected):
    """Queries, keys and values of a Linear, of GPT-2's layout, with grouped keys; else it is not known what it is."""
    param = nn.Parameter(torch.zeros(shape))
    found = momenta(AdaPM([("h.0.attn.c_attn.weight", param)], rank=4))["h.0.attn.c_attn.weight"]
    assert found == [(f"{momentum} element", where) for momentum, where in expected]


def test_gates_experts_and_heads():
    shapes = {
        "mlp.gate_up_proj.weight": (64, 16),
        "mlp.experts.gate_up_proj": (4, 16, 64),
        "mlp.experts.down_proj": (4, 32, 16),
        "attn.q_proj.weight": (32, 16),
        "attn.k_proj.weight": (8, 16),
        "attn.v_proj.weight": (32, 16),
        "attn.k_proj.bias": (8,),
        "norm.weight": (16,),
    }
    optimizer = AdaPM(on_meta(shapes), second_moment="adam-mini", head_dim=8)
    assert momenta(optimizer) == {
        "mlp.gate_up_proj.weight": [("lowrank rows", (0, 0, 32)), ("lowrank rows", (0, 32, 32))],
        "mlp.experts.gate_up_proj": [("lowrank cols", (2, 0, 32)), ("lowrank cols", (2, 32, 32))],
        "mlp.experts.down_proj": [("lowrank rows", None)],
        "attn.q_proj.weight": [("lowrank rows", None)],
        "attn.k_proj.weight": [("lowrank rows", None)],
        "attn.v_proj.weight": [("full rows", None)],
        "attn.k_proj.bias": [("full element", None)],
        "norm.weight": [("full rows", None)],
    }
    optimizer.init_state()
    state = dict(zip(shapes, optimizer.state.values(), strict=True))
    assert state["attn.q_proj.weight"]["exp_avg_sq_row"].shape == (4,)
    assert state["attn.v_proj.weight"]["exp_avg_sq_row"].shape == (32,)
    assert state["norm.weight"]["exp_avg_sq_row"].shape == (1,)
    assert state["mlp.experts.down_proj"]["exp_avg_sq_row"].shape == (4 * 32,)
    assert state["mlp.experts.gate_up_proj"]["exp_avg_sq_col.1"].shape == (4 * 32,)
    assert state["mlp.experts.gate_up_proj"]["exp_avg_left.1"].shape == (4, 16, 16)


def test_gpt2_s_matrices_have_their_outputs_in_columns():
    names = {"h.attn.c_attn.weight": (16, 48), "h.attn.c_proj.weight": (16, 16), "h.mlp.c_fc.weight": (16, 64)}
    found = momenta(AdamMini(on_meta(names), head_dim=8))
    assert [rule for rule, _ in found["h.attn.c_attn.weight"]] == ["full cols"] * 3
    assert found["h.attn.c_proj.weight"] == [("full cols", None)]
    # without heads there is nothing that tells queries from values
    assert momenta(AdamMini(on_meta(names)))["h.attn.c_attn.weight"] == [("full cols", None)]
    linear = {"h.attn.c_attn.weight": (48, 16), "h.attn.c_proj.weight": (16, 16)}
    assert momenta(AdamMini(on_meta(linear)))["h.attn.c_proj.weight"] == [("full rows", None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_slice_is_updated_as_a_parameter_of_its_own(transposed, dtype):
    """But for the noise of its rounding, which is another; states resume and load under other names."""
    shape = (16, 48) if transposed else (48, 16)
    whole = nn.Parameter(values(*shape, seed=0).to(dtype))
    dim = 1 if transposed else 0
    names = ("q_proj", "k_proj", "v_proj")
    parts = [nn.Parameter(x.clone()) for x in whole.detach().split(16, dim)]
    common = {"lr": 1e-2, "rank": 4, "stochastic_rounding": False}
    fused = AdaPM([("attn.c_attn.weight", whole)], **common)
    split = AdaPM([(f"attn.{n}.weight", p) for n, p in zip(names, parts, strict=True)], **common)
    for step in range(4):
        whole.grad = values(*shape, seed=1 + step).to(dtype)
        for part, grad in zip(parts, whole.grad.split(16, dim), strict=True):
            part.grad = grad.clone()
        fused.step()
        split.step()
    torch.testing.assert_close(torch.cat(list(parts), dim), whole, rtol=1e-6, atol=1e-6)
    state = fused.state[whole]
    assert {"step", "step.1", "step.2", "exp_avg_left", "exp_avg_left.1", "exp_avg.2", "exp_avg_sq.2"} <= state.keys()
    assert [state[key].item() for key in ("step", "step.1", "step.2")] == [4, 4, 4]
    torch.testing.assert_close(state["exp_avg.2"], split.state[parts[2]]["exp_avg"], rtol=1e-6, atol=1e-7)


def test_slices_resume_bit_for_bit_and_have_noise_of_their_own():
    """From a file that holds tensors and numbers only; the blocks come from it, not from the policy."""

    def make(policy=None):
        params = [nn.Parameter(values(48, 16, seed=0).bfloat16()), nn.Parameter(values(16, 16, seed=1).bfloat16())]
        named = [("attn.qkv.weight", params[0]), ("mlp.fc1.weight", params[1])]
        return params, AdaPM(named, lr=1e-2, rank=4, second_moment="adam-mini", policy=policy)

    params, optimizer = make()
    take_steps(optimizer, params, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again, resumed = make(policy="none")
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    take_steps(optimizer, params, 2, first=3)
    take_steps(resumed, again, 2, first=3)
    assert_same_bits(again, params)
    assert_same_states(states_of(resumed, again), states_of(optimizer, params))
    uids = [uid for bucket in optimizer._buckets() for uid in bucket.options()["rounding"].uids]
    assert len(set(uids)) == 4


def test_state_of_other_blocks_is_refused():
    params = [nn.Parameter(values(48, 16, seed=0))]
    optimizer = AdaPM([("attn.qkv.weight", params[0])], rank=4)
    take_steps(optimizer, params, 1)
    other = AdaPM([("attn.qkv.weight", params[0])], rank=4, policy="full")
    checkpoint = optimizer.state_dict()
    del checkpoint["param_groups"][0]["blocks"]
    with pytest.raises(ValueError, match=r"parameter 'attn.qkv.weight' has keys .*allowed: \['exp_avg', 'exp_avg_sq'"):
        other.load_state_dict(checkpoint)


def test_a_policy_may_say_anything():
    shapes = {"a": (8, 6), "b": (6, 9), "c": (4, 3, 5), "d": (7,)}

    def policy(name, param):
        assert tuple(param.shape) == shapes[name]
        return {
            "a": [(slice(0, 5), "lowrank"), (slice(5, None), "none")],
            "b": [((slice(None), slice(0, 3)), "full"), ((slice(None), slice(3, 9)), "lowrank")],
            "c": "lowrank",
            "d": "none",
        }[name]

    optimizer = AdaPM(on_meta(shapes), rank=2, policy=policy)
    assert momenta(optimizer) == {
        "a": [("lowrank element", (0, 0, 5)), ("none element", (0, 5, 3))],
        "b": [("full element", (1, 0, 3)), ("lowrank element", (1, 3, 6))],
        "c": [("lowrank element", None)],
        "d": [("none element", None)],
    }
    lines = optimizer.table().splitlines()
    assert [line.split()[0] for line in lines] == ["name", "a[0:5,", "a[5:8,", "b[:,", "b[:,", "c", "d", "total", "of"]
    momentum, second, elements = bytes_of(optimizer)
    assert lines[-2].split() == ["total", str(elements), str(momentum), str(second)]
    assert elements == 48 + 54 + 60 + 7


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "some",
            r"policy\('a', a parameter of shape \(8, 6\)\) is 'some'; allowed: 'none', 'lowrank', 'full', or a list",
        ),
        ([(slice(0, 8), "some")], "has 'some'; allowed: 'none'"),
        ([(slice(0, 4), "full")], "allowed: slices of one dimension, in order, that cover all of it"),
        ([(slice(4, 8), "full"), (slice(0, 4), "full")], "in order, that cover all of it"),
        ([(slice(0, 8, 2), "full")], "allowed: consecutive elements of one dimension"),
        ([(3, "full")], "allowed: a slice, or a tuple of slices"),
    ],
)
def test_what_a_policy_may_not_say(answer, message):
    with pytest.raises(ValueError, match=message):
        AdaPM(on_meta({"a": (8, 6)}), policy=lambda name, param: answer)


def test_roles_come_from_split_params():
    """By the types of modules: the embedding is told whatever its name, and the head too."""
    model = ByteModel(ModelConfig.from_width(1, 64, 16))
    by_role = momenta(AdaPM(split_params(model), rank=4))
    assert by_role == momenta(AdaPM(model.named_parameters(), rank=4))
    assert by_role["embedding.weight"] == [("none element", None)]
    assert by_role["head.weight"] == [("lowrank element", None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_full_momentum_is_adamw(dtype):
    params, others = make_params(dtype), make_params(dtype)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "stochastic_rounding": False}
    optimizer = AdaPM(params, policy="full", update_clip=None, **options)
    other = AdamW(others, **options)
    for step in range(10):
        for each, one in ((params, optimizer), (others, other)):
            set_gradients(each, step)
            one.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2 if dtype is torch.bfloat16 else 2e-6, atol=1e-6)


def test_rank_0_has_no_momentum():
    params, others = (make_params(names=("matrix", "transposed", "experts")) for _ in range(2))
    low, none = AdaPM(params, rank=0, policy="lowrank"), AdaPM(others, policy="none")
    take_steps(low, params, 3)
    take_steps(none, others, 3)
    assert_same_bits(params, others)
    assert all(state.keys() == {"step", "uid", "exp_avg_sq"} for state in low.state.values())


def test_a_spoiled_slice_keeps_itself():
    param = nn.Parameter(values(48, 16, seed=0))
    optimizer = AdaPM([("attn.qkv.weight", param)], rank=4)
    take_steps(optimizer, [param], 2)
    before = copies([param])[0]
    set_gradients([param], 1)
    param.grad = param.grad.clone()
    param.grad[20, 3] = float("nan")
    optimizer.step()
    moved = (param != before).any(1)
    assert not moved[16:32].any()
    assert moved[:16].all()
    assert moved[32:].all()
    assert [optimizer.state[param][key].item() for key in ("step", "step.1", "step.2")] == [3, 2, 3]
    assert optimizer.nonfinite_count() == 1


def test_slices_of_gradients_cost_no_call_of_python():
    """They are views that are made in C, however many there are."""
    counts = []
    for layers in (2, 20):
        named = [(f"h.{i}.attn.qkv.weight", nn.Parameter(values(12, 4, seed=i))) for i in range(layers)]
        optimizer = AdaPM(named, rank=2)
        for step in range(2):
            set_gradients([param for _, param in named], step)
            optimizer.step()
        set_gradients([param for _, param in named], 2)
        counts.append(calls_in(optimizer._buckets))
    assert counts[0] == counts[1]
