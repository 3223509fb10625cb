"""`lowmem profile` from end to end on a CPU, and what it would do on a GPU."""

import json
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

from lowmem_kernels.testing import bytes_moved
from lowmem_optim.cli import app, profile, profile_work

SMALL = ["--shape", "24x32", "--shape", "32", "--dtype", "fp32", "--device", "cpu", "--warmup", "1", "--steps", "2"]


@pytest.fixture
def command(tmp_path):
    def run(*arguments):
        out = tmp_path / "formula.json"
        result = CliRunner().invoke(app, ["profile", *arguments, "--formula", str(out)])
        return result, json.loads(out.read_text()) if out.exists() else None

    return run


def calls(output, name):
    """The last column of torch.profiler's table: how often something ran."""
    return int(re.search(rf"^\s*{re.escape(name)}.*\s(\d+)\s*$", output, re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("optimizer", "verb", "rules"),
    [
        ("adamw", "adamw_", ("adamw", "adamw", 4, 0)),
        # one sweep over the rows of g comes from a cache
        ("adalomo", "factored_update_", ("factored", "factored_vector", 0, 4)),
    ],
)
def test_an_optimizer_in_ranges_and_its_formula(command, optimizer, verb, rules):
    result, formula = command("--optimizer", optimizer, *SMALL)
    assert result.exit_code == 0, result.output
    name = f"{verb} float32 1 of 24x32, 1 vector"
    assert calls(result.output, name) == 2
    matrices, vectors, state, cached = rules
    least = sum(bytes_moved(matrices, 768, 4, state)) - 768 * cached + sum(bytes_moved(vectors, 32, 4, state))
    assert formula == {"ranges": [name], "steps": 2, "elements": 800, "least_bytes": least}


def test_a_verb(command):
    result, formula = command("--verb", "came, state as p", *SMALL)
    assert result.exit_code == 0, result.output
    assert formula["ranges"] == ["confidence_update_ float32 1 of 24x32, 1 vector"]
    assert calls(result.output, formula["ranges"][0]) == 2


def test_another_library_has_no_ranges_and_no_formula(command):
    result, formula = command("-o", "torch.sgd", *SMALL)
    assert result.exit_code == 0, result.output
    assert formula == {"ranges": [], "steps": 2, "elements": 800, "least_bytes": None}


def test_printed_commands_run_the_same_again(command):
    result, _ = command("-o", "lomo", *SMALL)
    lines = {line.split()[0]: shlex.split(line) for line in result.output.splitlines() if "lowmem profile" in line}
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum"
    ncu = lines["ncu"]
    assert ncu[ncu.index("--profile-from-start") + 1] == "off"
    assert ncu[ncu.index("--metrics") + 1] == metrics
    assert {"--csv", "--nvtx"} <= set(ncu)
    assert "--capture-range=cudaProfilerApi" in lines["nsys"]
    again = ["--optimizer", "lomo", *SMALL[:6], "--device", "cuda", *SMALL[8:]]
    for words in (ncu, lines["nsys"]):
        assert words[words.index("lowmem") :] == ["lowmem", "profile", *again]


def test_on_a_gpu_only_the_steps_are_captured(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    work = profile_work.Work("nothing", lambda: log.append("step"), 0, None)
    with profile._nsight() as enter:
        assert enter is torch.cuda.nvtx.range
        profile_work.run(work, 2, enter)
    assert log == ["synchronize", "start", "step", "step", "synchronize", "stop"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "adamw", "--verb", "came"], "only one of them"),
        (["-o", "adamv"], "did you mean"),
        (["--verb", "adafaktor"], "verb is 'adafaktor'; allowed: 'adamw'"),
        (["--shape", "4096*4096"], "'4096*4096' is not of the form 4096x11008"),
        (["--shape", "0x4"], "is not of the form"),
        (["--shape", "4x4", "--model", "gpt2"], "takes the place of --model"),
        (["--model", "gpt3"], "did you mean gpt2?"),
        (["--layers", "99"], "allows 1 to 8"),
        (["--device", "tpu"], "'tpu' is not available"),
        (["--warmup", "0"], "--warmup"),
    ],
)
def test_bad_arguments_are_named(command, arguments, message):
    result, formula = command("--device", "cpu", *arguments) if "--device" not in arguments else command(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert formula is None
