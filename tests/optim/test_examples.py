"""Every example runs in seconds on a CPU and learns; what it says is equal, is."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lion import Lion

from lowmem_optim import fuse_backward
from optim.tensors import assert_same_bits, assert_same_values, copies

EXAMPLES = Path(__file__).parents[2] / "examples"
ENTRIES = sorted(path for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__"))
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if "__main__" in path.read_text()]


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output_of(*command, **variables):
    """What a command of Python prints."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_in(text):
    """All of them, of "loss 2.1" and of "loss 2.1 at the start, 0.2 at the end"."""
    return [float(number) for number in re.findall(r"(?:loss|start,) (\d\S*)", text)]


def saved_by(folder):
    """What training depends on of a checkpoint, in one order: parameters, states, rates, running norm, scheduler."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    optimizer = checkpoint.pop("optimizer")
    groups = [(group["lr"], group.get("fused_norm")) for group in optimizer["param_groups"]]
    return {**checkpoint, "states": dict(sorted(optimizer["state"].items())), "groups": groups}


def mean(losses):
    return sum(losses) / len(losses)


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.name)
def test_every_example_has_a_test_and_a_row_in_the_readme(path):
    assert f"test_{path.stem}" in globals()
    assert f"[{path.stem}]({path.name}" in (EXAMPLES / "README.md").read_text()
    assert any(script.is_relative_to(path) for script in SCRIPTS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_help_says_how_to_run_it(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(rf"(python|torchrun .*) {path.relative_to(EXAMPLES.parent)}", shown)
    for line in path.read_text().split('"""')[1].splitlines():
        assert line.replace("\\\\", "\\") in shown


def test_plain_loop():
    losses = example("plain_loop").main(30)
    assert losses[-1] < 0.8 * losses[0]


def test_accelerate_loop(monkeypatch):
    """Without the line that fuses, the loop is one of the usual kind; a bound that does not bind changes nothing."""
    module = example("accelerate_loop")
    fuse = module.fuse_backward
    monkeypatch.setattr(
        module, "fuse_backward", lambda *args, **options: fuse(*args, **{**options, "clip_grad_norm": 1e6})
    )
    fused = module.main(20)
    monkeypatch.setattr(module, "fuse_backward", lambda *args, **options: None)
    assert module.main(20) == fused
    assert mean(fused[-10:]) < 0.8 * mean(fused[:10])


def test_transformers_trainer(tmp_path, monkeypatch):
    """Logs, and a resumed run: its running norm carries on too."""
    module = example("transformers_trainer")
    trainer = module.main(10, folder=str(tmp_path), save_steps=5)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(entry["grad_norm"] > 0.1 and entry["learning_rate"] > 0 for entry in log)
    whole = copies(trainer.model.parameters())
    again = module.main(10, folder=str(tmp_path), save_steps=5, resume=str(tmp_path / "checkpoint-5"))
    assert_same_bits(again.model.parameters(), whole)

    # max_grad_norm=0 clips nothing, in the Trainer too
    fused = module.main(5, max_grad_norm=0.0, folder=str(tmp_path))
    assert not any("grad_norm" in entry for entry in fused.state.log_history)
    monkeypatch.setattr(module.FuseBackwardCallback, "on_train_begin", lambda *args, **kwargs: None)
    plain = module.main(5, max_grad_norm=0.0, folder=str(tmp_path))
    assert_same_bits(plain.model.parameters(), fused.model.parameters())


def test_transformers_trainer_with_an_optimizer_of_ones_own(tmp_path, monkeypatch):
    """By ``optimizers=``, without the Trainer's two groups: those decide which gradients are part of a norm so far."""
    module = example("transformers_trainer")
    expected = module.main(4, max_grad_norm=0.0, folder=str(tmp_path))
    trainer = module.Trainer

    def make(*, model, optimizer_cls_and_kwargs, **arguments):
        cls, options = optimizer_cls_and_kwargs
        return trainer(model=model, optimizers=(cls(model.named_parameters(), **options), None), **arguments)

    monkeypatch.setattr(module, "Trainer", make)
    found = module.main(4, max_grad_norm=0.0, folder=str(tmp_path))
    assert_same_bits(found.model.parameters(), expected.model.parameters())


@pytest.mark.filterwarnings("ignore")  # Lightning advises about workers and accelerators
def test_lightning_module(monkeypatch):
    module = example("lightning_module")
    losses = module.main(20).losses
    assert mean(losses[-10:]) < 0.8 * mean(losses[:10])
    fused = module.main(5, gradient_clip_val=None)
    monkeypatch.setattr(module.FuseBackwardCallback, "on_train_start", lambda *args: None)
    assert_same_bits(module.main(5, gradient_clip_val=None).parameters(), fused.parameters())


class Crash(Exception):
    pass


@pytest.mark.parametrize("options", [[], ["--fuse", "--clip", "0.5"]], ids=["ordinary", "fused"])
def test_finetune_causal_lm(options, tmp_path, monkeypatch):
    """It learns, and after a crash in the middle of writing a checkpoint it ends with the bits of a run without.

    Fused, the bound is below the norm of every gradient, so that the running norm has to carry on as well.
    """
    module = example("finetune_causal_lm")
    options = ["--steps", "16", "--save-every", "6", *options]
    losses = module.main([*options, "--output", str(tmp_path / "whole")])
    # 5.5 nats is a uniform guess over 256 bytes
    assert losses[0] > 5.4
    assert losses[-1] < losses[0] - 0.6

    write, calls = torch.save, []

    def crash_in_the_second(state, file):
        calls.append(state["step"])
        if len(calls) == 2:
            file.write(b"half")
            raise Crash
        write(state, file)

    folder = tmp_path / "crashed"
    monkeypatch.setattr(torch, "save", crash_in_the_second)
    with pytest.raises(Crash):
        module.main([*options, "--output", str(folder)])
    monkeypatch.undo()
    assert calls == [6, 12]
    assert module.main([*options, "--output", str(folder)]) == losses[6:]
    whole, carried_on = saved_by(tmp_path / "whole"), saved_by(folder)
    assert whole["step"] == 16
    assert_same_values(carried_on, whole)
    assert not list(folder.glob("*.tmp"))

    # what it leaves is a model, with the parameters of the checkpoint
    model = module.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert_same_bits(model.state_dict().values(), [whole["model"][name] for name in model.state_dict()])


@pytest.mark.parametrize("name", ["AdamW", "SinkGD"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_finetune_causal_lm_has_the_same_bits_fused(name, tmp_path):
    """Where the bound does not bind. Gradients of micro-batches are added alike; checkpointing computes them again."""
    module = example("finetune_causal_lm")
    options = ["--optimizer", name, "--steps", "3", "--clip", "inf"]
    module.main([*options, "--output", str(tmp_path / "ordinary")])
    module.main([*options, "--output", str(tmp_path / "fused"), "--fuse", "--gradient-checkpointing"])
    ordinary, fused = (saved_by(tmp_path / name) for name in ("ordinary", "fused"))
    assert_same_values(fused["model"], ordinary["model"])
    assert_same_values(fused["states"], ordinary["states"])


def test_finetune_causal_lm_takes_every_optimizer():
    module = example("finetune_causal_lm")
    for name in module.NAMES:
        lr = ["--lr", "1e-3"] if name == "Adafactor" else []
        losses = module.main(["--optimizer", name, *lr, "--steps", "2", "--batch-size", "1", "--micro-batches", "1"])
        assert all(5 < loss < 6 for loss in losses)


def test_finetune_causal_lm_takes_a_model_of_a_folder(tmp_path, capsys):
    """And its tokenizer, both of which it leaves."""
    from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

    module = example("finetune_causal_lm")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    # with dropout, and the head tied to the embedding
    GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("Gradients come and go. " * 20)
    options = ["--text", str(tmp_path / "text"), "--steps", "12"]
    model, output = tmp_path / "model", tmp_path / "output"
    first = module.main([*options, "--model", str(model), "--output", str(output)])
    assert first[-1] < first[0] - 0.1
    # starts where that has ended
    assert module.main([*options, "--model", str(output)])[0] < first[0] - 0.1
    (tmp_path / "text").write_text("short")
    with pytest.raises(SystemExit, match="has 6 tokens; allowed: at least --context, 64"):
        module.main([*options, "--model", str(model)])


def test_fsdp2_train(tmp_path):
    """By torchrun, and then one process alone, which carries on."""
    command = (EXAMPLES / "fsdp2_train.py", "Adafactor", tmp_path, "--steps", 30)
    losses = losses_in(output_of("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    losses += losses_in(output_of(*command, **alone))
    # a uniform guess over 256 bytes is 5.5
    assert losses[0] > 5
    # where it has left off, and better
    assert losses[1] < 3.5
    assert losses[2] < 3.5
    assert losses[3] < losses[1] - 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30", "60"]


def test_custom_verb(capsys):
    """By the reference alone, which says how to run more, and with the interpreter, which takes the kernel."""
    example("custom_verb/train").main()
    alone = capsys.readouterr().out
    first, last = losses_in(alone)
    assert last < 0.2 * first
    assert "2 bytes of state for each parameter" in alone
    assert "TRITON_INTERPRET=1" in alone
    both = output_of(EXAMPLES / "custom_verb" / "train.py", "--steps", 5, TRITON_INTERPRET="1")
    reference, kernel = losses_in(both)[:2], losses_in(both)[2:]
    assert kernel == reference
    assert reference[0] == first
    assert "the kernel's parameters and momenta have the bits of the reference's" in both


def test_custom_verb_has_what_the_base_class_brings():
    """A fused backward pass, and a resumed run, with the bits of ordinary steps."""
    ends = []
    for way in ("ordinary", "fused", "resumed"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Linear(9, 3)).bfloat16()
        optimizer = Lion(model.named_parameters(), lr=1e-2, weight_decay=0.1)
        if way == "fused":
            fuse_backward(model, optimizer)
        for step in range(4):
            if way == "resumed" and step == 2:
                saved = optimizer.state_dict()
                optimizer = Lion(model.named_parameters())
                optimizer.load_state_dict(saved)
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*copies(model.parameters()), *(optimizer.state[p]["exp_avg"] for p in model.parameters())])
    assert_same_bits(ends[1], ends[0])
    assert_same_bits(ends[2], ends[0])
