"""`lowmem train --resume`: a training that was stopped ends as one that was not, to the last bit."""

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from lowmem_optim.cli import app, checkpoints, loop
from lowmem_optim.cli.data import Text
from lowmem_optim.cli.files import alone_in
from lowmem_optim.cli.log import NAMES
from lowmem_optim.cli.model import ModelConfig
from lowmem_optim.cli.registry import choices
from optim.test_sharded import environment_of_tests

TINY = [
    *("--layers", "1", "--dim", "32", "--context", "16", "--batch-size", "2", "--device", "cpu"),
    *("--eval-every", "4", "--eval-batches", "1", "--log-every", "3"),
]
#: what is the same whenever and wherever a run is made, and what is measured
SAME = ("optimizer", "status", "training_loss", "validation_loss", "grad_norm", "update_rms", "state_bytes")
CONFIG = loop.TrainConfig(
    model=ModelConfig.from_width(layers=1, dim=32, context=8),
    steps=6,
    batch_size=2,
    lr=None,
    warmup=2,
    clip_grad_norm=0.5,
    seed=0,
    dtype="bf16",
    device="cpu",
    eval_every=2,
    eval_batches=1,
    options={},
    log_every=2,
)
#: which fsync is that of the second checkpoint's tensors: after two for the settings and five for the first checkpoint
IN_SECOND = 8
NUMBERS = Text(torch.arange(64, dtype=torch.uint8), torch.arange(64, dtype=torch.uint8), "numbers", 1)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of parallel test processes would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    """A small text."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(["low", "memory", "kernels", "train"], k=2000)))
    return path


def invoke(*arguments, code=0):
    """The command's output; it leaves with the code."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def runs_of(folder):
    """What two trainings have in common if they are the same."""
    return [{key: run[key] for key in SAME} for run in json.loads((folder / "record.json").read_text())["runs"]]


def csv_of(folder):
    with (folder / "steps.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


#: with bfloat16 parameters, whose rounding depends on what the state says of seeds and steps. torch's optimizers cast
#: what they load to the dtype of the parameters, by which ASGD and NAdam lose digits of theirs
KINDS = {
    "ordinary": (True, CONFIG),
    "fused": (True, replace(CONFIG, fused_backward=True)),
    "torch": (False, replace(CONFIG, dtype="fp32")),
}


@pytest.mark.parametrize(
    ("choice", "config"),
    [
        pytest.param(choice, config, id=f"{choice.name}-{kind}")
        for kind, (own, config) in KINDS.items()
        for choice in choices().values()
        if choice.can_fuse == own
    ],
)
def test_every_optimizer_goes_on_with_its_bits(tmp_path, choice, config):
    whole = loop.train(choice, config, NUMBERS)
    first = loop.train(choice, config, NUMBERS, asked_to_stop=lambda: True, folder=tmp_path)
    assert (first.status, first.steps_taken) == ("interrupted", 1)
    stops = iter([False, True])
    second = loop.train(choice, config, NUMBERS, asked_to_stop=lambda: next(stops), folder=tmp_path)
    assert (second.status, second.steps_taken) == ("interrupted", 3)
    third = loop.train(choice, config, NUMBERS, folder=tmp_path)
    assert third.fused == config.fused_backward
    for key in SAME:
        assert getattr(third, key) == getattr(whole, key), key
    # and a finished one stays as it is
    assert loop.train(choice, config, NUMBERS, folder=tmp_path).step_ms == third.step_ms


def test_killed_by_sigkill(tmp_path, text):
    """In the second of two runs, somewhere after its first checkpoint: what is redone leaves no trace but its time."""
    options = [*TINY, "-o", "adalomo", "-c", "adamw", "--fused-backward", "--dtype", "bf16", "--data", str(text)]
    options += ["--steps", "200", "--checkpoint-every", "20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", "from lowmem_optim.cli import app; app()", "train", *options, "--out", str(killed)],
        env=environment_of_tests(),
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (killed / "AdamW").exists() or checkpoints.latest(killed / "AdamW") is None:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (killed / "record.json").exists()
    assert checkpoints.latest(killed / "AdaLomo").name == "step-200"
    (killed / "AdamW" / "step-195.partial").mkdir()
    invoke("--resume", killed)
    invoke(*options, "--checkpoint-every", "0", "--out", whole)
    assert runs_of(killed) == runs_of(whole)
    assert [path.name for path in killed.glob("AdamW/step-*")] == ["step-200"]


def test_ctrl_c_stops_after_the_step_and_loses_none(tmp_path, text, monkeypatch):
    options = [*TINY, "--steps", "10", "-o", "adamw", "-c", "torch.SGD", "--data", text]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    invoke(*options, "--out", whole)

    def show_and_interrupt(self, run):
        if (run.optimizer, run.steps_taken) == ("torch.SGD", 7):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("lowmem_optim.cli.progress.Display.show", show_and_interrupt)
        output = invoke(*options, "--out", stopped, code=130)
    assert f"lowmem train --resume {stopped} goes on" in output
    assert [run["status"] for run in runs_of(stopped)] == ["finished", "interrupted"]
    assert len(runs_of(stopped)[1]["training_loss"]) == 7
    # where one is does not matter
    monkeypatch.chdir(tmp_path)
    invoke("--resume", stopped.name)
    assert runs_of(stopped) == runs_of(whole)
    for name in ("AdamW", "torch.SGD"):
        one, other = csv_of(whole / name), csv_of(stopped / name)
        assert [row["step"] for row in other] == [str(step) for step in range(1, 11)]
        times = ("step_ms", "optimizer_ms")
        assert [{k: v for k, v in row.items() if k not in times} for row in one] == [
            {k: v for k, v in row.items() if k not in times} for row in other
        ]
    # a second time there is nothing to do
    invoke("--resume", stopped)
    assert runs_of(stopped) == runs_of(whole)


def test_tensorboard_shows_each_step_once(tmp_path):
    (choice,) = (choice for choice in choices().values() if choice.name == "AdamW")
    steps = iter([False, False, True])
    loop.train(choice, CONFIG, NUMBERS, asked_to_stop=lambda: next(steps), folder=tmp_path)
    run = loop.train(choice, CONFIG, NUMBERS, folder=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(NAMES.values())
    shown = {name: [(event.step, event.value) for event in events.Scalars(tag)] for name, tag in NAMES.items()}
    assert shown["training_loss"] == [(i, pytest.approx(loss)) for i, loss in enumerate(run.training_loss, 1)]
    for name in run.EVERY_SOME_STEPS:
        assert shown[name] == [(step, pytest.approx(value)) for step, value in getattr(run, name)]
    assert shown["lr"] == [(step, pytest.approx(run.lr * CONFIG.rate(step - 1))) for step in range(1, 7)]


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    (choice,) = (choice for choice in choices().values() if choice.name == "AdamW")
    config = replace(CONFIG, checkpoint_every=2)
    whole = loop.train(choice, config, NUMBERS)

    def fail(path, content):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        written = checkpoints.write_whole
        patch.setattr(
            checkpoints, "write_whole", lambda path, content: (fail if "-4" in str(path) else written)(path, content)
        )
        with pytest.raises(OSError, match="no space"):
            loop.train(choice, config, NUMBERS, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-4.partial"]
    shutil.rmtree(tmp_path / "step-4.partial")  # as the command does
    run = loop.train(choice, config, NUMBERS, folder=tmp_path)
    assert run.training_loss == whole.training_loss
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-6"]


def test_a_second_ctrl_c_in_the_middle_of_a_checkpoint(tmp_path, text, monkeypatch):
    """It is not waited for, and the one before stays."""
    options = [*TINY, "--steps", "8", "-o", "adamw", "--checkpoint-every", "1", "--data", text]
    write, written = os.fsync, []

    def interrupt(file):
        written.append(file)
        if len(written) == IN_SECOND:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        write(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        output = invoke(*options, "--out", tmp_path / "stopped", code=130)
    assert output.endswith(f"lowmem train --resume {tmp_path / 'stopped'} goes on")
    assert [run["status"] for run in runs_of(tmp_path / "stopped")] == ["interrupted"]
    assert {path.name for path in tmp_path.glob("stopped/AdamW/step-*")} == {"step-1", "step-2.partial"}
    invoke("--resume", tmp_path / "stopped")
    invoke(*options, "--out", tmp_path / "whole")
    assert runs_of(tmp_path / "stopped") == runs_of(tmp_path / "whole")


def test_a_full_disk_is_one_line(tmp_path, text, monkeypatch):
    """What was done stays, and where there is space again it goes on."""
    options = [*TINY, "--steps", "4", "-o", "adamw", "--checkpoint-every", "1", "--data", text]
    write, written = os.fsync, []

    def fill(file):
        written.append(file)
        if len(written) == IN_SECOND:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        output = invoke(*options, "--out", tmp_path / "full", code=1)
    assert output.endswith(f"[Errno 28] No space left on device lowmem train --resume {tmp_path / 'full'} goes on")
    invoke("--resume", tmp_path / "full")
    invoke(*options, "--out", tmp_path / "whole")
    assert runs_of(tmp_path / "full") == runs_of(tmp_path / "whole")


def test_one_at_a_time(tmp_path, text):
    """Two trainings in a folder would take each other's checkpoints away."""
    invoke(*TINY, "--steps", "1", "-o", "lomo", "--data", text, "--out", tmp_path / "run")
    with alone_in(tmp_path / "run"):
        assert "another process works in" in invoke("--resume", tmp_path / "run", code=2)
    invoke("--resume", tmp_path / "run")


def test_a_step_whose_validation_diverges_is_none(tmp_path, monkeypatch):
    """Neither in the run nor in its log."""
    (choice,) = (choice for choice in choices().values() if choice.name == "AdamW")
    losses = iter([5.0, float("nan")])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    run = loop.train(choice, CONFIG, NUMBERS, folder=tmp_path)
    assert run.status == "diverged"
    assert run.validation_loss == [(2, 5.0)]
    assert len(csv_of(tmp_path)) == len(run.training_loss) == len(run.step_ms) == 3


def test_without_checkpoints_the_end_is_kept(tmp_path):
    (choice,) = (choice for choice in choices().values() if choice.name == "AdamW")
    saved = []
    config = replace(CONFIG, checkpoint_every=0)
    loop.train(choice, config, NUMBERS, lambda run: saved.append(checkpoints.latest(tmp_path)), folder=tmp_path)
    assert saved == [None] * 6
    assert checkpoints.latest(tmp_path).name == "step-6"


@pytest.mark.parametrize("given", [["--steps", "5"], ["-o", "adamw", "--checkpoint-every", "1"]])
def test_other_options_are_refused(tmp_path, text, given):
    invoke(*TINY, "--steps", "1", "-o", "lomo", "--data", text, "--out", tmp_path / "run")
    named = ", ".join("--optimizer" if flag == "-o" else flag for flag in given if flag.startswith("-"))
    assert f"with {named}; allowed: --device, --nproc and --sharding" in invoke(
        "--resume", tmp_path / "run", *given, code=2
    )


def test_on_another_device(tmp_path, text):
    """One that was named, and is not there any more."""
    folder = tmp_path / "run"
    invoke(*TINY, "--steps", "1", "-o", "lomo", "--data", text, "--out", folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings["arguments"]["device"] = "cuda:9"
    (folder / "settings.json").write_text(json.dumps(settings))
    assert "'--device': 'cuda:9' is not available; this machine has cpu" in invoke("--resume", folder, code=2)
    invoke("--resume", folder, "--device", "cpu")
    assert json.loads((folder / "record.json").read_text())["config"]["device"] == "cpu"


def test_a_folder_without_a_training_or_with_another_text(tmp_path, text):
    assert "has no settings.json; allowed: a folder that" in invoke("--resume", tmp_path, code=2)
    for content, message in (("{", "is not JSON: "), ("{}", "is not that of this version of lowmem train: KeyError(")):
        (tmp_path / "settings.json").write_text(content)
        assert message in invoke("--resume", tmp_path, code=2)
    invoke(*TINY, "--steps", "1", "-o", "lomo", "--data", text, "--out", tmp_path / "run")
    text.write_text(text.read_text().replace("low", "high"))
    assert "is not the text that the training in" in invoke("--resume", tmp_path / "run", code=2)
