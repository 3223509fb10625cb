"""The examples run and learn, and trainers give the same bits with and without the update in the backward pass."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from optim.tensors import assert_same_bits, copies

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(losses):
    return sum(losses) / len(losses)


def test_every_example_is_tested():
    """Here, but for that of sharded parameters, in test_sharded.py."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "plain_loop",
        "accelerate_loop",
        "transformers_trainer",
        "lightning_module",
        "fsdp2_train",
    }


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


@pytest.mark.filterwarnings("ignore")
def test_callbacks_refuse_what_they_cannot_do():
    from lowmem_optim.integrations import lightning, transformers

    class Several:
        world_size, n_gpu, optimizers = 2, 1, [1, 2]

    with pytest.raises(RuntimeError, match="the Trainer has 2 processes with 1 devices each; allowed: one of one"):
        transformers.FuseBackwardCallback().on_train_begin(Several, None, None, model=None, optimizer=None)
    with pytest.raises(RuntimeError, match="the module has 2 optimizers; allowed: one"):
        lightning.FuseBackwardCallback().on_train_start(Several, None)

    class Scaled:
        optimizers, precision = [1], "16-mixed"

        class precision_plugin:
            scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(TypeError, match="precision is '16-mixed'; a GradScaler unscales"):
        lightning.FuseBackwardCallback().on_train_start(Scaled, None)
