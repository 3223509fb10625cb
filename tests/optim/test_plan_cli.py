"""`lowmem plan` from end to end: the table, JSON, the picture, what a MODEL may be, and what it says to take."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import lowmem_optim
from lowmem_kernels.testing.models import MODELS, Architecture, parameter_count
from lowmem_optim import split_params
from lowmem_optim.cli import app
from lowmem_optim.cli.plan_advice import PREFERRED, recommendation
from lowmem_optim.cli.plan_memory import PARTS, Row, Setting
from lowmem_optim.cli.plan_model import Model, module_of
from lowmem_optim.cli.plan_report import size_of
from optim.cases import exported
from optim.test_bench import words

TINY = Architecture(64, 32, 48, 2, 4, 2)
SOME = ("-o", "adamw", "-o", "SinkGD", "-o", "torch.adamw")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "300", "TERM": "dumb"})


def planned(*arguments):
    """The JSON that the command prints."""
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_table_json_and_picture(tmp_path):
    plot, record = tmp_path / "deep" / "plan.png", tmp_path / "plan.json"
    result = run("tiny", *SOME, "--gpu", "200MB", "--plot", plot, "--json", record)
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    plan = json.loads(record.read_text())
    assert plan == planned("tiny", *SOME, "--gpu", "200MB")
    count = parameter_count(TINY.shapes())
    assert (plan["parameters"], plan["tensors"], plan["gpu_bytes"]) == (count, 21, 200_000_000)
    assert plan["fused_gradients_bound"] == 2 * 2 * 64 * 32
    assert plan["setting"]["dtype"] == "bfloat16"
    modes = {(row["optimizer"], row["mode"]) for row in plan["rows"]}
    assert modes == {
        *((name, mode) for name in ("AdamW", "SinkGD") for mode in ("ordinary", "fused")),
        ("torch.AdamW(fused)", "ordinary"),
    }
    for row in plan["rows"]:
        assert row["total"] == sum(row[part] for part in PARTS)
        assert row["fits"]
    output = words(result.output)
    assert "tiny: 0.020 M parameters, bf16, 1 x 2048 tokens" in output
    assert plan["recommendation"] in output
    assert str(record) in output


def test_everyone_by_default_and_a_dtype():
    plan = planned("tiny", "--dtype", "fp32")
    assert {row["optimizer"] for row in plan["rows"]} == {*exported(), "torch.AdamW(fused)"}
    assert {row["parameters"] for row in plan["rows"]} == {4 * parameter_count(TINY.shapes())}
    assert {row["fits"] for row in plan["rows"]} == {None}


def test_options_batch_and_checkpointing_count():
    few, many = planned("tiny", "-o", "APOLLO", "--opt", "rank=1"), planned("tiny", "-o", "APOLLO", "--opt", "rank=8")
    assert few["rows"][0]["state"] < many["rows"][0]["state"]
    one, four = (planned("tiny", "-o", "lomo", "--sequence", 64, "--batch", n)["rows"][0] for n in (1, 4))
    assert four["activations"] == 4 * one["activations"]
    less = planned("tiny", "-o", "lomo", "--sequence", 64, "--checkpointing")["rows"][0]
    assert less["activations"] < one["activations"]


def test_several_devices_say_what_is_arithmetic_only():
    output = words(run("tiny", *SOME, "--ranks", 4, "--sharding", "fsdp2", "--gpu", "1GB").output)
    assert "FSDP2 of 4" in output
    assert "SinkGD fused" in output
    assert "Take AdamW: " in output
    output = words(run("tiny", *SOME, "--ranks", 4).output)
    assert "DDP of 4" in output
    assert "gradient_as_bucket_view=True" in output


def test_roles_are_the_table_of_split_params():
    result = run("tiny", "--roles")
    assert result.stdout.strip() == str(split_params(module_of(TINY.shapes())))
    assert "lm_head.weight" in result.stdout


def test_the_transcript_in_the_docs_is_what_is_printed():
    """A line of it for each optimizer that there was; columns are as wide as they need be."""
    docs = Path(__file__).parents[2] / "docs" / "planning.md"
    lines = [" ".join(line.split()) for line in docs.read_text(encoding="utf-8").splitlines()]
    arguments = "llama-7b --gpu 24GB --checkpointing"
    assert any(line.startswith(f"lowmem plan {arguments} ") for line in lines)
    printed = [" ".join(line.split()) for line in run(*arguments.split()).output.splitlines()]
    rows = [line for line in lines if line.split()[2:3] == ["13.477"]]
    assert len(rows) == 27
    assert set(rows) <= set(printed)
    sentence = next(line for line in printed if line.startswith("Take "))
    assert sentence in " ".join(line.removeprefix("> ") for line in lines)
    readme = " ".join((docs.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert sentence.partition(",")[0] in readme


# what a MODEL may be


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None], ids=str)
def test_a_configuration_of_transformers(tmp_path, architectures):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, architectures=architectures,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    expected = planned("tiny", *SOME)
    for path in (tmp_path, tmp_path / "config.json"):
        found = planned(path, *SOME)
        assert found["rows"] == expected["rows"]
        assert found["sizes"] == expected["sizes"]


def test_a_callable_whose_sizes_nobody_knows(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\ndef convolutions():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run("my_models:convolutions", *SOME)
    assert "Activations are not in it" in words(result.output)
    plan = planned("my_models:convolutions", *SOME)
    assert plan["parameters"] == 3 * 8 * 9 + 8 + 16
    assert {row["activations"] for row in plan["rows"]} == {None}
    assert str(tmp_path) not in sys.path


def test_activations_of_an_encoder_and_a_decoder_are_not_made_up(tmp_path):
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        architectures=["T5ForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    plan = planned(tmp_path, *SOME)
    assert (plan["sizes"], plan["rows"][0]["activations"]) == (None, None)


def test_frozen_parameters_have_no_gradients(monkeypatch):
    def adapted():
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
        model[0].requires_grad_(False)
        return model

    monkeypatch.setattr("optim.cases.adapted", adapted, raising=False)
    rows = planned("optim.cases:adapted", "-o", "sinkgd")["rows"]
    assert {row["parameters"] for row in rows} == {2 * 80}
    assert {row["gradients"] for row in rows} == {2 * 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lama-7b",), "'MODEL': model is 'lama-7b'; did you mean llama-7b"),
        (("bert",), "'MODEL': model is 'bert'; allowed: gpt2, gpt2-xl, llama-60m"),
        (("someone/Llama-7b-hf",), "model is 'someone/Llama-7b-hf'; did you mean llama-7b"),
        (("7b",), "model is '7b'; did you mean llama-7b or mixtral-8x7b? allowed: gpt2"),
        (("{folder}",), "the folder {folder} has no config.json; allowed: a config.json of transformers, a folder"),
        (("{folder}/text",), "cannot read {folder}/text as JSON"),
        (("{folder}/list.json",), "{folder}/list.json has no 'model_type'; allowed: a config.json of transformers"),
        (("{folder}/alien.json",), "transformers cannot build a model from {folder}/alien.json"),
        (
            ("no_such:thing",),
            "model is 'no_such:thing': ModuleNotFoundError: No module named 'no_such'; allowed: ",
        ),
        (("json:no_such",), "model is 'json:no_such': AttributeError: module 'json' has no attribute 'no_such'"),
        (("json:dumps",), "json:dumps() on the meta device: TypeError"),
        (("builtins:dict",), "builtins:dict() returned a dict; allowed: a torch.nn.Module"),
        (("torch.nn:ReLU",), "model is 'torch.nn:ReLU', which has no parameters to train; allowed: one that has"),
        (("tiny", "--gpu", "24 apples"), "'--gpu': '24 apples' is not a size; allowed: a number > 0 with MB, GB"),
        (("tiny", "--gpu", "24"), "'--gpu': '24' is not a size; allowed: a number > 0 with MB, GB"),
        (("tiny", "--gpu", "0GB"), "'--gpu': '0GB' is not a size"),
        (("tiny", "-o", "adamv"), "'--optimizer': no optimizer is named 'adamv'; did you mean "),
        (("tiny", "-o", "torch.adafactor"), "torch.Adafactor cannot be planned: its step reads values"),
        (("tiny", "-o", "apollo", "--opt", "ranks=3"), "'--opt': 'ranks' is not an argument of APOLLO; did you mean"),
        (("tiny", "-o", "apollo", "--opt", "rank=0"), "'--opt': APOLLO(rank=0): rank is 0; allowed: "),
        (("tiny", "--ranks", "2", "--sharding", "none"), "none with --ranks 2; allowed: ddp or fsdp2 with several"),
        (("tiny", "--sharding", "fsdp2"), "'--sharding': fsdp2 with --ranks 1; allowed: none with one rank"),
        (("tiny", "--ranks", "0"), "Invalid value for '--ranks'"),
        (("tiny", "--dtype", "fp8"), "'fp8' is not one of 'bf16', 'fp32'"),
        (("tiny", "--plot", "{folder}"), "'--plot': {folder} is a folder; a file is needed"),
        (("tiny", "--json", "{folder}/text/x"), "'--json': cannot make the folder"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    (tmp_path / "text").write_text("not json")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "alien.json").write_text('{"model_type": "alien"}')
    result = run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert message.format(folder=tmp_path) in words(result.output)


def test_without_transformers_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "needs transformers: pip install 'lowmem-kernels[hf]'" in words(result.output)


def test_help_names_every_model():
    output = words(run("--help").output)
    assert not [name for name in MODELS if name != "tiny" and name not in output]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12), ("7MiB", 7 * 2**20)]
)
def test_sizes(text, nbytes):
    assert size_of(text) == nbytes


# what to take

PLAIN = Setting(torch.bfloat16, 1, 1, False)
UNKNOWN = Model("it", nn.Linear(1, 1), None)


def row(optimizer, mode, gigabytes, part="state"):
    figures = dict.fromkeys(PARTS, 0) | {part: round(gigabytes * 1e9)}
    return Row(optimizer, mode, **figures)


def test_the_first_that_fits_is_taken_and_an_ordinary_step_before_a_fused_one():
    rows = [
        row("Lomo", "fused", 10),
        row("APOLLO", "fused", 20),
        row("APOLLO", "ordinary", 23),
        row("AdamW", "fused", 60),
    ]
    assert recommendation(UNKNOWN, rows, PLAIN, 24 * 10**9) == (
        "Take APOLLO: 23.0 GB of 24.0 GB, and of those that fit it keeps most of Adam (both moments of a random "
        "projection); AdamW with fuse_backward would take 60.0 GB."
    )
    assert recommendation(UNKNOWN, rows, PLAIN, 22 * 10**9).startswith("Take APOLLO with fuse_backward: 20.0 GB")
    assert recommendation(UNKNOWN, rows, PLAIN, 60 * 10**9).startswith(
        "Take AdamW with fuse_backward: 60.0 GB of 60.0 GB"
    )
    assert "Take AdaPM with fuse_backward: " in recommendation(UNKNOWN, [row("AdaPM", "fused", 1)], PLAIN, 10**9)
    assert PREFERRED.keys() <= {*exported(), "torch.AdamW(fused)"}


def test_reasons_are_true_of_few_optimizers():
    """One by itself keeps no more of Adam than others, and SinkGD keeps nothing."""
    rows = [row("APOLLO", "fused", 20), row("APOLLO", "ordinary", 30)]
    assert recommendation(UNKNOWN, rows, PLAIN, 24 * 10**9) == (
        "Take APOLLO with fuse_backward: 20.0 GB of 24.0 GB; APOLLO with ordinary steps would take 30.0 GB."
    )
    rows = [row("SinkGD", "fused", 20), row("AdamW", "fused", 30)]
    assert ", and none of these that keeps more of Adam fits; AdamW" in recommendation(UNKNOWN, rows, PLAIN, 24 * 10**9)


@pytest.mark.parametrize(("gigabytes", "batch"), [(18, None), (21.9, None), (22, 3), (90, 20)])
def test_the_batch_that_fits(gigabytes, batch):
    """State takes 10 GB, and each of now two sequences 4."""
    rows = [replace(row("APOLLO", "fused", 10), activations=8 * 10**9)]
    said = recommendation(UNKNOWN, rows, replace(PLAIN, batch=2), round(gigabytes * 1e9))
    assert said == f"Take APOLLO with fuse_backward: 18.0 GB of {gigabytes:.1f} GB." + (
        f" It fits up to --batch {batch}." if batch else ""
    )


def test_what_would_fit_is_planned_and_fits():
    def plan(*arguments):
        return planned("llama-1b", "-o", "lomo", *arguments)

    def total(*arguments):
        return plan(*arguments)["rows"][0]["total"] / 1e9

    def advice(gigabytes):
        return plan("--batch", 4, "--gpu", f"{gigabytes}GB")["recommendation"].partition("23.8 GB. ")[2]

    assert advice(9) == f"With --checkpointing it takes {total('--batch', 4, '--checkpointing'):.1f} GB."
    assert total("--checkpointing") < 4 < total("--batch", 4, "--checkpointing")
    assert advice(4) == "With --checkpointing and a smaller --batch it fits."
    most = int(advice(3).removeprefix("With --checkpointing, --batch 1 and --sequence ").removesuffix(" it fits."))
    assert total("--checkpointing", "--sequence", most) <= 3 < total("--checkpointing", "--sequence", most + 1)
    assert advice(1) == "It takes a larger device, several with --ranks N --sharding fsdp2, or a smaller model."
    freed = "An optimizer of this package with fuse_backward frees gradients as they arrive."
    assert planned("tiny", "-o", "torch.sgd", "--sequence", 1, "--gpu", "0.07MB")["recommendation"].endswith(freed)


def test_the_code_that_is_printed_makes_the_optimizer():
    output = run("tiny", "-o", "sinkgd", "--opt", "fallback=adafactor", "--gpu", "1GB", "--batch", "1").output
    code = [line for line in output.splitlines() if line.startswith(("optimizer = ", "lowmem_optim.fuse"))]
    namespace = {"lowmem_optim": lowmem_optim, "model": module_of(TINY.shapes(), "cpu")}
    exec("\n".join(code), namespace)
    assert isinstance(namespace["optimizer"], lowmem_optim.SinkGD)
    assert "adafactor" in repr(namespace["optimizer"])


def test_nothing_fits_and_no_device_is_named():
    rows = [row("Lomo", "fused", 10, part="activations"), row("AdamW", "ordinary", 60)]
    assert recommendation(UNKNOWN, rows, PLAIN, 10**9) == (
        "Nothing fits in 1.0 GB: the least is Lomo with fuse_backward, 10.0 GB. It takes a larger device, several with "
        "--ranks N --sharding fsdp2, or a smaller model."
    )
    assert recommendation(UNKNOWN, rows, PLAIN, None) == (
        "Lomo with fuse_backward takes least, 10.0 GB, and AdamW most, 60.0 GB; --gpu SIZE says what to take."
    )
