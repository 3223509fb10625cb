"""`lowmem doctor` from end to end on a CPU, and its self-check, which has to be able to fail."""

import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lowmem_optim
from lowmem_kernels import dispatch
from lowmem_kernels.device import device_facts
from lowmem_optim import lomo
from lowmem_optim.cli import app, doctor_facts
from lowmem_optim.conformance import PROBES, RULES, Subject, find_rule, self_check
from lowmem_optim.conformance.selfcheck import UGLY, how
from lowmem_optim.conformance.subject import ALLOWED
from optim.cases import exported


def doctor(*arguments):
    """The result of the command, and its output without boxes, colours and line breaks."""
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments])
    return result, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).replace("│", " ").split())


def subjects(*names):
    return [Subject(name, getattr(lowmem_optim, name)) for name in names]


@pytest.fixture
def wrong_lomo(monkeypatch):
    """A rule that is off by one in a hundred thousand."""
    right = lomo.scaled_update_
    monkeypatch.setattr(
        lomo, "scaled_update_", lambda *args, lr, **options: right(*args, lr=lr * (1 + 1e-5), **options)
    )


def test_the_machine_is_fine(tmp_path):
    path = tmp_path / "deep" / "doctor.json"
    result, text = doctor("--json", str(path))
    assert result.exit_code == 0, result.output
    assert "backend='auto' is torch: The tensors are on the CPU, where kernels run only in Triton's" in text
    assert "Triton's kernels do not run here: the tensors are on the CPU" in text
    assert "All optimizers are right here." in text
    report = json.loads(path.read_text())
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["environment"]["versions"]["NumPy"] == np.__version__
    assert report["environment"]["backend"]["name"] == "torch"
    checks = report["self_check"]["checks"]
    assert {check["optimizer"] for check in checks} == set(exported())
    assert all(check["ok"] and 0 < check["times"] <= 1 for check in checks)
    assert {check["where"] for check in checks} <= set(UGLY)


@pytest.mark.usefixtures("wrong_lomo")
def test_a_wrong_rule_is_found():
    result, text = doctor()
    assert result.exit_code == 1
    assert re.search(r"Lomo float32 [\d.e+]+ \S+ failed", text)
    assert text.endswith("Failed: Lomo.")
    (check,) = self_check(subjects("Lomo"))
    # 1e-5 of the update, of which 2e-6 are allowed, and the roundings of parameters
    assert 1 < check.times < 5


def test_what_raises_is_a_line(monkeypatch):
    def raises(*args, **options):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(lomo, "scaled_update_", raises)
    first, second = self_check(subjects("Lomo", "AdamW"))
    assert (first.ok, first.error) == (False, "RuntimeError: no such kernel")
    assert second.ok
    result, _ = doctor("--json", "-")
    assert result.exit_code == 1
    line = next(each for each in json.loads(result.stdout)["self_check"]["checks"] if each["optimizer"] == "Lomo")
    assert line["times"] is None
    assert line["error"] == "RuntimeError: no such kernel"


def test_what_others_say_is_no_markup(monkeypatch):
    def raises(*args, **options):
        raise RuntimeError("no [/red] kernel")

    monkeypatch.setattr(lomo, "scaled_update_", raises)
    assert "RuntimeError: no [/red] kernel failed" in doctor()[1]


def test_every_optimizer_has_a_rule():
    assert set(exported()) <= {rule.name for rule in RULES}


def test_what_is_compared_depends_on_the_machine(monkeypatch):
    assert how("cpu")[0] == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert how("cpu") == ("triton", "Triton's kernels in Triton's interpreter against the torch reference on the CPU.")


@pytest.mark.parametrize(
    ("value", "name", "why"),
    [
        (None, "torch", "The tensors are on the CPU, where kernels run only"),
        ("torch", "torch", "The environment variable LOWMEM_BACKEND is 'torch'."),
        ("triton", "none", "the environment variable LOWMEM_BACKEND is 'triton', which cannot be used here"),
        ("cuda", "none", "the environment variable LOWMEM_BACKEND is 'cuda'; allowed: 'auto', 'triton', 'torch'"),
    ],
)
def test_the_backend_and_why(monkeypatch, value, name, why):
    if value is not None:
        monkeypatch.setenv("LOWMEM_BACKEND", value)
    found = doctor_facts.backend("cpu")
    assert found[0] == name
    assert found[1].startswith(why)
    assert (doctor_facts.facts("cpu")["variables"]["LOWMEM_BACKEND"]) == value


def test_a_backend_that_cannot_be_is_a_failure(monkeypatch):
    monkeypatch.setenv("LOWMEM_BACKEND", "triton")
    result, text = doctor()
    assert result.exit_code == 1
    assert "backend='auto' is none: the environment variable LOWMEM_BACKEND is 'triton'" in text


def test_what_is_said_of_a_gpu(monkeypatch):
    """Of one that is not there."""
    found = {"name": "H999", "multi_processor_count": 132, "L2_cache_size": 50 * 2**20, "warp_size": 32}
    properties = SimpleNamespace(**found, major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device_facts.cache_clear()
    _, gpu = doctor_facts.facts("cpu")["devices"]
    device_facts.cache_clear()
    assert gpu == {
        "device": "cuda:0",
        "name": "H999",
        "architecture": "sm_90",
        "SMs": 132,
        "L2, MiB": 50.0,
        "memory, GiB": 80.0,
        "warp": 32,
    }


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert how("cpu")[1].startswith("Triton's kernels do not run here: Triton is not installed")


def test_an_optimizer_is_examined(tmp_path):
    path = tmp_path / "adamw.json"
    result, text = doctor("-o", "torch.optim:AdamW", "--opt", "betas=(0.8, 0.9)", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "torch.optim.AdamW(lr=0.01, weight_decay=0.0, betas=(0.8, 0.9)) on cpu" in text
    assert "It agrees with AdamW (Adam with decoupled decay), within 0." in text
    assert text.count("Nothing is wrong") == 1
    report = json.loads(path.read_text())
    assert [verdict["probe"] for verdict in report["verdicts"]] == list(PROBES)
    assert report["optimizer"]["version"] == torch.__version__
    assert report["optimizer"]["arguments"]["betas"] == [0.8, 0.9]


def test_the_exit_status_says_that_something_is_wrong():
    result, text = doctor("-o", "optim.broken:ChangesGradients")
    assert result.exit_code == 1
    assert "gradients after step wrong step() changes the gradients." in text
    assert text.endswith("Wrong: gradients after step.")


def test_against_another_rule():
    result, text = doctor("-o", "torch.optim:SGD", "--against", "adamw")
    assert result.exit_code == 1
    assert "It is not AdamW (Adam with decoupled decay): off by" in text
    assert "It agrees with Lomo." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "torch.optim.AdamW"), f"optimizer is 'torch.optim.AdamW': it has no colon; allowed: {ALLOWED}"),
        (("-o", "no_such_module:AdamW"), "No module named 'no_such_module'; allowed: module:Class"),
        (("-o", "./mine.py:Lion"), "optimizer is './mine.py:Lion': TypeError: "),
        (("-o", "torch.optim:AdamX"), "module 'torch.optim' has no attribute 'AdamX'; allowed: module:Class"),
        (("-o", "torch:nn"), "optimizer is 'torch:nn', which is a module; allowed: module:Class"),
        (("-o", "torch.nn:Linear"), "optimizer is 'torch.nn:Linear', which is a type; allowed: module:Class"),
        (("-o", "torch.optim:LBFGS"), "torch.optim.LBFGS cannot take a step here: TypeError: LBFGS.step() missing"),
        (
            ("-o", "torch.optim:AdamW", "--opt", "beta=1"),
            "'beta' is not an argument of torch.optim.AdamW; did you mean",
        ),
        (("-o", "torch.optim:AdamW", "--opt", "lr=1"), "lr is 1, and the probes choose it; allowed: other arguments"),
        (
            ("-o", "torch.optim:AdamW", "--opt", "betas=3"),
            "torch.optim.AdamW(lr=0.01, weight_decay=0.0, betas=3): TypeError: ",
        ),
        (("-o", "torch.optim:AdamW", "--against", "adafactr"), "no rule is named 'adafactr'; did you mean Adafactor"),
        (("--against", "AdamW"), "it says something of --optimizer, which is missing"),
        (("-o", "torch.optim:AdamW", "--group", "rank"), "'rank' is not of the form key=value"),
        (("--opt", "eps=1"), "it says something of --optimizer, which is missing"),
        (("--device", "cuda:9"), "'cuda:9' is not available; this machine has cpu"),
        (("--json", "."), ". is a folder; a file is needed"),
    ],
)
def test_usage_errors(arguments, message):
    result, text = doctor(*arguments)
    assert result.exit_code == 2, result.output
    assert message in text


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    """Of the current folder."""
    (tmp_path / "unfinished.py").write_text("class Lion(")
    monkeypatch.chdir(tmp_path)
    result, text = doctor("-o", "unfinished:Lion")
    assert result.exit_code == 2, result.output
    assert "optimizer is 'unfinished:Lion': SyntaxError: '(' was never closed" in text


def test_rules_in_any_case():
    assert find_rule("TORCHADAFACTOR").name == "TorchAdafactor"
    with pytest.raises(ValueError, match="no rule is named 'zzz'; known: AdamW, Adam, Lomo"):
        find_rule("zzz")


def test_the_help_names_every_rule():
    _, text = doctor("--help")
    assert all(re.search(rf"\b{rule.name}\b", text) for rule in RULES)


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lowmem_optim", "--device", "cpu", "-o", "torch.optim:SGD", "--json", "-"])
    with pytest.raises(SystemExit) as status:
        runpy.run_module("lowmem_optim", run_name="__main__")
    assert status.value.code == 0
    assert json.loads(capsys.readouterr().out)["verdicts"][0]["finding"] == "Lomo"
