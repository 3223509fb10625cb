"""`lowmem train --nproc`: what several processes (gloo) make of a training is what one makes of it."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from optim.test_sharded import environment_of_tests

COMMAND = [sys.executable, "-c", "from lowmem_optim.cli import app; app()", "train"]
TINY = [
    *("--layers", "1", "--dim", "32", "--context", "16", "--batch-size", "4", "--device", "cpu"),
    *("--eval-every", "2", "--eval-batches", "2"),
]


@pytest.fixture
def start(tmp_path):
    """Starts the command on a small text in a session of its own; returns the process and where its record will be."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(["low", "memory", "kernels", "train"], k=2000)))
    running = []

    def run(*arguments, out="run"):
        command = [*COMMAND, *TINY, "--data", str(text), "--out", str(tmp_path / out), *arguments]
        process = subprocess.Popen(
            command,
            env=environment_of_tests(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process, tmp_path / out / "record.json"

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def finished(started, code=0):
    process, record = started
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    return output, json.loads(record.read_text()) if record.exists() else None


def test_losses_are_those_of_one_process(start):
    """Up to the rounding of means over halves of a batch, of which whitening (not here) would make 2e-5 in 4 steps."""
    arguments = ["--steps", "4", "-o", "adamw", "-c", "adalomo", "-c", "sinkgd"]
    _, alone = finished(start(*arguments))
    for sharding in ("fsdp2", "ddp"):
        output, record = finished(start(*arguments, "--nproc", "2", "--sharding", sharding, out=sharding))
        assert f"2 processes with {sharding}, cpu" in " ".join(output.split())
        assert "AdaLomo  step 4/4  loss" in output
        assert record["config"]["processes"] == {"count": 2, "sharding": sharding}
        for run, expected in zip(record["runs"], alone["runs"], strict=True):
            assert run["status"] == "finished"
            assert run["training_loss"] == pytest.approx(expected["training_loss"], rel=2e-6)
            for (step, loss), (same, other) in zip(run["validation_loss"], expected["validation_loss"], strict=True):
                assert step == same
                assert loss == pytest.approx(other, rel=2e-6)
            # all processes together
            assert run["state_bytes"] == expected["state_bytes"]


def test_fused_backward_has_the_losses_of_steps(start):
    arguments = ["--steps", "2", "-o", "came", "--nproc", "2", "--clip-grad-norm", "0"]
    runs = [finished(start(*arguments, *more, out=out))[1] for more, out in (([], "a"), (["--fused-backward"], "b"))]
    assert runs[0]["runs"][0]["training_loss"] == runs[1]["runs"][0]["training_loss"]
    assert runs[1]["runs"][0]["fused"]


def test_a_failing_process_fails_the_command(start):
    output, record = finished(start("--steps", "2", "-o", "torch.Adafactor", "--nproc", "2"), code=1)
    assert "a process has failed" in output
    assert record is None


def test_an_interrupt_keeps_what_was_measured(start):
    process, record = start("--steps", "100000", "-o", "lomo", "--nproc", "2")
    line = ""
    while "step 4/" not in line:
        line = process.stdout.readline()
        assert line, "the command has ended by itself"
    os.killpg(process.pid, signal.SIGINT)
    _, kept = finished((process, record), code=130)
    assert kept["interrupted"]
    assert len(kept["runs"][0]["training_loss"]) >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nproc", "3"), "'--nproc': 3 does not divide --batch-size 4"),
        (("--nproc", "0"), "should be greater than or equal to 1"),
        (("--sharding", "ddp"), "'--sharding': ddp with --nproc 1; allowed: several processes"),
        (("--nproc", "2", "--fused-backward"), "'--clip-grad-norm': 1 with --fused-backward and fsdp2; allowed: 0"),
    ],
)
def test_refusals(start, arguments, message):
    output, _ = finished(start(*arguments), code=2)
    assert message in " ".join(output.replace("│", " ").split())
