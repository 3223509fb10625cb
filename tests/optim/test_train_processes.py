"""`lowmem train --nproc`: what several processes (gloo) make of a training is what one makes of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from lowmem_optim.cli import app
from lowmem_optim.cli.processes import check_processes, run_in
from optim.test_sharded import environment_of_tests

TINY = [
    *("--layers", "1", "--dim", "32", "--context", "16", "--batch-size", "4", "--device", "cpu"),
    *("--eval-every", "2", "--eval-batches", "2"),
]


@pytest.fixture
def arguments(tmp_path, text):
    """The command's arguments: those given, for a small model and text, and the folder for results."""
    return lambda *given, out="run": ["train", *TINY, "--data", str(text), "--out", str(tmp_path / out), *given]


@pytest.fixture
def train(arguments, tmp_path, capfd):
    """Runs the command from here; returns all that it and its processes print, and its record, None for no record."""

    def run(*given, code=0, out="run"):
        capfd.readouterr()
        result = CliRunner().invoke(app, arguments(*given, out=out))
        record = tmp_path / out / "record.json"
        output = " ".join((capfd.readouterr().out + result.output).replace("│", " ").split())
        assert result.exit_code == code, output
        return output, json.loads(record.read_text()) if record.exists() else None

    return run


def assert_same_losses(record, expected):
    """Up to the rounding of means over halves of a batch, of which whitening (not here) would make 2e-5 in 4 steps."""
    for run, other in zip(record["runs"], expected["runs"], strict=True):
        assert run["status"] == "finished"
        assert run["training_loss"] == pytest.approx(other["training_loss"], rel=2e-6)
        steps, losses = zip(*run["validation_loss"], strict=True)
        assert [*zip(steps, losses, strict=True)] == [
            (n, pytest.approx(x, rel=2e-6)) for n, x in other["validation_loss"]
        ]


def test_shards_have_the_losses_of_one_process(train):
    given = ["--steps", "4", "-o", "adamw", "-c", "adalomo", "-c", "sinkgd"]
    _, alone = train(*given)
    output, record = train(*given, "--nproc", "2", out="shards")
    assert "2 processes with fsdp2, cpu" in output
    assert "AdaLomo step 4/4 loss" in output
    assert "2 processes: optimizer state and gradients are what all have together" in output
    assert record["config"]["processes"] == {"count": 2, "sharding": "fsdp2"}
    assert_same_losses(record, alone)
    for run, expected in zip(record["runs"], alone["runs"], strict=True):
        assert run["state_bytes"] == expected["state_bytes"]
        assert run["gradient_bytes"] == expected["gradient_bytes"]


def test_copies_have_the_losses_of_one_process(train):
    """After a backward pass, and fused into it."""
    given = ["--steps", "4", "-o", "torch.adamw", "-c", "adalomo", "--clip-grad-norm", "0"]
    _, alone = train(*given)
    output, record = train(*given, "--nproc", "2", "--sharding", "ddp", "--fused-backward", out="copies")
    assert "2 processes: optimizer state and gradients are what each has" in output
    assert [run["fused"] for run in record["runs"]] == [False, True]
    assert_same_losses(record, alone)
    assert [run["state_bytes"] for run in record["runs"]] == [run["state_bytes"] for run in alone["runs"]]


def test_going_on_in_as_many_processes_or_one(train, tmp_path):
    """With a constant rate, the first steps of a training do not know how many will follow."""
    options = ["-o", "adalomo", "--nproc", "2", "--sharding", "fsdp2", "--schedule", "constant", "--warmup", "0"]
    options += ["--log-every", "1", "--eval-every", "1"]
    _, whole = train(*options, "--steps", "5")
    train(*options, "--steps", "3", out="2")
    shutil.copytree(tmp_path / "2", tmp_path / "1")
    for nproc in ("2", "1"):
        settings = json.loads((tmp_path / nproc / "settings.json").read_text())
        settings["arguments"]["steps"] = 5
        (tmp_path / nproc / "settings.json").write_text(json.dumps(settings))
        result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / nproc), "--nproc", nproc])
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / nproc / "record.json").read_text())
        if nproc == "1":
            assert_same_losses(record, whole)
            continue
        for run, expected in zip(record["runs"], whole["runs"], strict=True):
            for key in ("training_loss", "grad_norm", "update_rms", "state_bytes"):
                assert run[key] == expected[key], key


def test_a_second_ctrl_c_says_how_to_go_on(train, tmp_path, monkeypatch):
    """It is raised where the first process waits for the others."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_optim.cli.train_all.run_in", interrupt)
    output, _ = train("--steps", "2", "-o", "lomo", "--nproc", "2", code=130)
    assert output.endswith(f"lowmem train --resume {tmp_path / 'run'} goes on")


def test_an_optimizer_that_takes_no_shards(train):
    output, record = train("--steps", "2", "-o", "torch.Adafactor", "--nproc", "2", code=2)
    assert "'--sharding': fsdp2 with torch.Adafactor: aten." in output
    assert "Traceback" not in output
    assert record is None


def fail_in_the_second(rank, check_in):
    if rank == 1:
        raise OSError("the disk is full")
    dist.barrier()


def test_a_failing_process_ends_those_that_wait_for_it():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"a process has failed: -- Process 1(.|\n)*OSError: the disk is full"):
        run_in(2, "cpu", fail_in_the_second)
    # they start in 2 seconds, and would wait for 300
    assert time.monotonic() - start < 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_processes_start_ends_all_after_a_step(arguments, tmp_path, number):
    """A terminal's or a scheduler's reaches all: the first imports torch, and the second is not yet there."""
    command = [sys.executable, "-c", "from lowmem_optim.cli import app; app()"]
    process = subprocess.Popen(
        [*command, *arguments("--steps", "100000", "-o", "lomo", "--nproc", "2")],
        env=environment_of_tests(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        # after that of multiprocessing itself
        while len(children.read_text().split()) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        os.killpg(process.pid, number)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["interrupted"]
    assert len(record["runs"][0]["training_loss"]) == 1
    assert (tmp_path / "run" / "Lomo" / "step-1" / "run.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--nproc", "3"), "'--nproc': 3 does not divide --batch-size 4; allowed: 1, 2, 4"),
        (("--nproc", "0"), "'--nproc': "),
        (("--sharding", "ddp"), "'--sharding': ddp with --nproc 1; allowed: several processes"),
        (("--nproc", "2", "--fused-backward"), "'--clip-grad-norm': 1 with --fused-backward and fsdp2; allowed: 0"),
    ],
)
def test_refusals(train, given, message):
    output, record = train(*given, code=2)
    assert message in output
    assert record is None


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(2, 12, "cuda:0")
    check_processes(1, 12, "cuda:1")
    check_processes(4, 12, "cpu")
    with pytest.raises(ValueError, match=r"3 is more than the GPUs here.*; allowed: 1 to 2"):
        check_processes(3, 12, "cuda:0")
    with pytest.raises(ValueError, match="2 with --device cuda:1, which is one GPU; allowed: 1, or --device cuda"):
        check_processes(2, 12, "cuda:1")
