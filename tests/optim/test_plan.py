"""`lowmem plan` against live tensors, what launches allocate and what autograd keeps; every model that has a name."""

import time
from collections import Counter

import pytest
import torch
import transformers

from lowmem_kernels.factored import launch as factored_launch
from lowmem_kernels.multinorm import launch as multinorm_launch
from lowmem_kernels.projection import launch as projection_launch
from lowmem_kernels.projection.banks import Bank
from lowmem_kernels.testing.allocations import LiveGradients
from lowmem_kernels.testing.fake_driver import fake_driver
from lowmem_kernels.testing.models import MODELS, Architecture, model_shapes, parameter_count
from lowmem_optim import fuse_backward, split_params
from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.cli import registry
from lowmem_optim.cli.measure import state_bytes
from lowmem_optim.cli.model import ByteModel, ModelConfig
from lowmem_optim.cli.plan_memory import Setting, activation_bytes, largest_two, layer_bytes, nbytes, plan
from lowmem_optim.cli.plan_model import Model, load_model, module_of
from lowmem_optim.cli.plan_report import notes
from lowmem_optim.cli.plan_scratch import scratch_bytes
from optim.cases import exported

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TINY = {
    "llama": Architecture(64, 32, 48, 2, 4, 2),
    "gpt2": Architecture(64, 32, 128, 2, 4, 4, tied=True, positions=16),
    "experts": Architecture(64, 32, 48, 1, 4, 2, experts=4, experts_per_token=2),
}
EVERYONE = [*(choice for choice in registry.choices().values() if choice.can_fuse), registry.find("torch.AdamW")]


def setting(dtype=torch.bfloat16, **others):
    return Setting(dtype, 1, 128, False, **others)


def planned(model, choice, dtype=torch.bfloat16, options=None, **others):
    """Rows by mode, of the same model on the meta device."""
    rows = plan(Model("test", model.to("meta", dtype), None), [choice], options or {}, setting(dtype, **others))
    return {row.mode: row for row in rows}


def test_all_of_this_package_and_the_baseline_are_planned():
    names = {choice.name for choice in EVERYONE}
    assert names == {*exported(), "torch.AdamW"}
    rows = plan(Model("test", module_of(TINY["llama"].shapes()), None), EVERYONE, {}, setting())
    assert Counter(row.mode for row in rows) == {"ordinary": len(EVERYONE), "fused": len(EVERYONE) - 1}
    assert [row.total for row in rows] == sorted(row.total for row in rows)


# live tensors


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", EVERYONE, ids=lambda choice: choice.name)
def test_state_and_gradients_are_those_of_a_live_step(choice, dtype, kind):
    model = module_of(TINY[kind].shapes(), "cpu").to(DTYPES[dtype])
    for param in model.parameters():
        torch.nn.init.normal_(param)
        param.grad = torch.randn_like(param)
    optimizer = choice.construct(model, {"rank": 8})
    optimizer.step()
    live = state_bytes(optimizer), sum(p.grad.nbytes for p in model.parameters())
    assert live[1] > 0
    ordinary = planned(module_of(TINY[kind].shapes()), choice, DTYPES[dtype], {"rank": 8})["ordinary"]
    assert (ordinary.state, ordinary.gradients) == pytest.approx(live, rel=0.01)
    assert ordinary.parameters == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", ["AdaLomo", "SinkGD", "AdaPM"])
def test_fused_gradients_are_those_alive_in_a_backward_pass(name):
    config = ModelConfig.from_width(6, 64, 8)
    torch.manual_seed(0)
    model, tokens = ByteModel(config), torch.randint(0, 256, (1, 8))
    live = LiveGradients(list(model.parameters()))
    with fuse_backward(model, registry.find(name).construct(model, {})):
        model.loss(tokens, tokens).backward()
    rows = planned(ByteModel(config), registry.find(name), torch.float32)
    assert rows["fused"].gradients == pytest.approx(live.peak, rel=0.01)
    assert rows["fused"].gradients <= largest_two(model.parameters()) < rows["ordinary"].gradients / 9
    assert rows["fused"].state == rows["ordinary"].state


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdaLomo", {}),
        ("CAME", {}),
        ("SinkGD", {"fallback": "table"}),
        ("APOLLO", {"rank": 8, "fallback": "adafactor"}),
        ("APOLLOMini", {"fallback": "adafactor"}),
    ],
)
def test_temporaries_are_the_scratch_of_the_launches(name, options, monkeypatch):
    """Launches are stopped where they would start, with what was allocated for them."""
    asked = []
    for module in (factored_launch, multinorm_launch, projection_launch):
        monkeypatch.setattr(
            module,
            "launch_schedule",
            lambda kernel, schedule, params, where, scratch, **_: asked.append(scratch.nbytes + schedule.values.nbytes),
        )
    monkeypatch.setattr(Bank, "draw", lambda self, epoch: asked.append(self.values.nbytes))
    model = module_of(TINY["llama"].shapes(), "cpu").bfloat16()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    choice = registry.find(name)
    with fake_driver():
        optimizer = choice.construct(model, {"backend": "triton", **options})
        found = []
        update = optimizer.update

        def compared(bucket):
            asked.clear()
            update(bucket)
            found.append((scratch_bytes(optimizer, bucket), sum(asked)))

        optimizer.update = compared
        optimizer.step()
    assert found
    assert all(expected == allocated > 0 for expected, allocated in found), found


def test_squares_of_swan_stay_within_what_it_may_take():
    row = planned(module_of(model_shapes("llama-7b", 2)), registry.find("SWAN"))["ordinary"]
    # five of 4096 x 4096 in float32, and two numbers for each row
    assert 5 * 4 * 4096**2 < row.temporaries < 5 * 4 * 4096**2 + 8 * 2 * (5 * 4096 + 2 * 11008 + 4096)


def test_temporaries_of_an_optimizer_that_is_not_known_are_not_made_up():
    class Unknown(LowMemOptimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0}, {})

        def check_options(self, options):
            pass

        def new_state(self, param, group):
            return {}

    for row in planned(module_of(TINY["llama"].shapes()), registry.Choice("Unknown", Unknown)).values():
        assert row.temporaries is None
        assert row.total == row.parameters + row.gradients + row.state
        assert notes([row], setting())[:2] == [
            "Activations are not in it: the sizes of this model's layers are not known.",
            "Temporaries of Unknown are not in it: nobody has counted them.",
        ]


COMMON = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
COMMON |= {"num_attention_heads": 4}
AUTOGRAD = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, num_key_value_heads=2)),
    "qwen": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**COMMON, head_dim=16, num_key_value_heads=2)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, num_local_experts=4, num_key_value_heads=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0
        )
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AUTOGRAD)
def test_activations_are_what_autograd_keeps(name, dtype, monkeypatch):
    """An estimate: within a tenth for models of transformers; logits, a peak that is not kept, are left out."""
    model = AUTOGRAD[name]().to(DTYPES[dtype])
    parameters = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    tokens = torch.randint(0, 64, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=tokens).last_hidden_state
    assert hidden.requires_grad
    monkeypatch.setattr("optim.cases.made_here", AUTOGRAD[name], raising=False)
    sizes = load_model("optim.cases:made_here", DTYPES[dtype]).sizes
    one = Setting(DTYPES[dtype], 2, 64, False)
    logits = 2 * 64 * sizes.vocab * (one.dtype.itemsize + 8)
    assert activation_bytes(sizes, one) - logits == pytest.approx(sum(n for n, _ in kept.values()), rel=0.1)


def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    sizes = load_model("llama-7b", torch.bfloat16).sizes
    whole, one = (Setting(torch.bfloat16, 1, 10, checkpointing) for checkpointing in (False, True))
    layer = 2 * 4096 * 8 + 2 * 4096 * 4 + 4 * 2 * 11008
    rest = 4096 * 8 + 32000 * 10
    assert activation_bytes(sizes, whole) == 10 * (32 * layer + rest)
    assert activation_bytes(sizes, one) == 10 * (layer + 32 * 4096 * 2 + rest)


# models that have names


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_planned_in_seconds(name):
    start = time.process_time()
    model = load_model(name, torch.bfloat16)
    rows = plan(model, EVERYONE, {}, setting())
    assert time.process_time() - start < 10
    shapes = model_shapes(name)
    assert {name: tuple(p.shape) for name, p in model.module.named_parameters()} == shapes
    assert all(param.is_meta for param in model.module.parameters())
    assert {row.parameters for row in rows} == {2 * parameter_count(shapes)}
    assert all(row.activations > 0 for row in rows)
    roles = {entry.name: entry.role for entry in split_params(model.module).assignments}
    assert roles.pop("lm_head.weight", "head") == "head"
    tables = {"model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    for each, role in roles.items():
        assert role == ("embedding" if each in tables else "vector" if len(shapes[each]) < 2 else "matrix")


@pytest.mark.parametrize(
    ("name", "options", "state"),
    [
        # counted by hand for Llama 7B, in 1e9 bytes of float32: moments of matrices, and AdamW's of the rest
        ("AdamW", {}, 53.91),
        ("AdamW", {"state_dtype": "param"}, 26.95),
        ("torch.AdamW", {}, 26.95),
        ("APOLLO", {}, 2 * (1.619 + 1.050)),
        ("APOLLO", {"fallback": "adafactor"}, 2 * 1.619),
        ("APOLLOMini", {}, 2 * (0.006 + 1.050)),
        ("SinkGD", {}, 2 * 1.050),
        ("Lomo", {}, 0.0),
    ],
)
def test_state_of_llama_7b(name, options, state):
    model = load_model("llama-7b", torch.bfloat16)
    row = plan(model, [registry.find(name)], options, setting())[0]
    assert row.state / 1e9 == pytest.approx(state, rel=0.003, abs=0.002)


# several devices


def test_ddp_has_buckets_and_fused_gradients_twice():
    model = module_of(TINY["llama"].shapes())
    alone = planned(model, registry.find("AdaLomo"))
    several = planned(model, registry.find("AdaLomo"), ranks=4, sharding="ddp")
    for mode, row in several.items():
        assert row.communication == row.gradients == alone[mode].gradients
        assert row.total == alone[mode].total + row.gradients


def test_fsdp2_divides():
    model = module_of(model_shapes("llama-60m"))
    for name in ("AdamW", "SinkGD", "torch.AdamW"):
        whole = planned(model, registry.find(name))
        rows = planned(model, registry.find(name), ranks=8, sharding="fsdp2")
        assert rows.keys() == whole.keys()
        root, layer = layer_bytes(model)
        for mode, row in rows.items():
            for part in ("parameters", "gradients", "state"):
                assert getattr(row, part) == pytest.approx(getattr(whole[mode], part) / 8, rel=0.001)
            assert row.communication == root + 2 * layer + 2 * max(root, layer)
    assert root == 2 * (2 * 32000 * 512 + 512)
    assert root + 8 * layer == sum(map(nbytes, model.parameters()))


def test_states_that_do_not_go_along_with_rows_are_whole():
    """Of APOLLO's moments those of wide matrices, r numbers for each column; of Adafactor's sums those of columns."""
    wide, tall = torch.nn.Linear(96, 32, bias=False), torch.nn.Linear(32, 96, bias=False)
    model = torch.nn.Sequential(wide, tall, torch.nn.Linear(64, 64, bias=False))
    row = planned(model, registry.find("apollo"), options={"rank": 4}, ranks=8, sharding="fsdp2")["ordinary"]
    # step, epoch and norm of three; with as many rows as columns, columns are contracted
    assert row.state == 4 * (2 * 4 * 96 + 2 * 4 * 96 // 8 + 2 * 4 * 64 // 8 + 3 * 3)
    row = planned(model, registry.find("adafactor"), ranks=8, sharding="fsdp2")["ordinary"]
    whole = planned(model, registry.find("adafactor"))["ordinary"]
    rows, columns = 32 + 96 + 64, 96 + 32 + 64
    assert whole.state - row.state == 4 * (rows - rows // 8)
    assert row.state >= 4 * (rows // 8 + columns)


def test_parts_are_those_of_the_rank_that_has_most():
    model = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=False))
    row = planned(model, registry.find("torch.AdamW"), torch.float32, ranks=4, sharding="fsdp2")["ordinary"]
    assert row.parameters == row.gradients == 2 * 8 * 4  # 2 of 5 rows
