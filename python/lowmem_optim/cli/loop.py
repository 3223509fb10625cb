"""Trains one model with one optimizer, and measures it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowmem_kernels.testing.allocations import LiveGradients
from lowmem_optim import fuse_backward
from lowmem_optim.cli import checkpoints
from lowmem_optim.cli.data import Batch, Text, training_batches, validation_batches
from lowmem_optim.cli.log import Log
from lowmem_optim.cli.measure import PeakMemory, Updates, grad_norm, now, state_bytes
from lowmem_optim.cli.model import ByteModel, ModelConfig, loss_of
from lowmem_optim.cli.processes import ALONE, Processes
from lowmem_optim.cli.registry import Choice
from lowmem_optim.cli.run import Run
from lowmem_optim.cli.schedule import schedule
from lowmem_optim.fused_backward import FusedBackward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """What every compared optimizer has in common; `clip_grad_norm` 0 means no clipping.

    `options` go to those optimizers that take them; `lr` None means each optimizer's own default. Its `schedule` ends
    at the fraction `final_lr`. Norms are logged every `log_every` steps; `checkpoint_every` 0 means checkpoints at the
    end only. With `fused_backward` those of this package update inside the backward pass. `batch_size` is that of all
    `processes` together.
    """

    model: ModelConfig
    steps: int
    batch_size: int
    lr: float | None
    warmup: int
    clip_grad_norm: float
    seed: int
    dtype: str
    device: str
    eval_every: int
    eval_batches: int
    options: dict[str, Any]
    schedule: str = "cosine"
    final_lr: float = 0.1
    log_every: int = 10
    checkpoint_every: int = 50
    fused_backward: bool = False
    processes: Processes = ALONE

    @property
    def tokens_per_step(self) -> int:
        """Bytes of text that one step trains on."""
        return self.batch_size * self.model.context

    def rate(self, step: int) -> float:
        """The fraction of the peak learning rate that a step from 0 has."""
        return schedule(step, self.schedule, self.warmup, self.steps, self.final_lr)

    def saves(self, taken: int) -> bool:
        """Whether there is a checkpoint after so many steps."""
        return taken == self.steps or bool(self.checkpoint_every and taken % self.checkpoint_every == 0)


class NotFiniteError(Exception):
    """The loss became infinite or not a number."""


def train(
    choice: Choice,
    config: TrainConfig,
    text: Text,
    show: Callable[[Run], None] = lambda run: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    folder: Path | None = None,
) -> Run:
    """Trains a model from the start, or from where the folder's last checkpoint is, and returns what became of it.

    `show` sees the run after every step; then it ends if `asked_to_stop`. Checkpoints and figures of every step go into
    the folder, if there is one. Divergence, and Ctrl-C unless handled elsewhere, end up in the run's status.
    """
    checkpoint = None if folder is None else checkpoints.latest(folder)
    run = new_run(choice, config) if checkpoint is None else checkpoints.read_run(checkpoint)
    if run.steps_taken == config.steps:
        run.status = "finished"
        return run
    memory, before = PeakMemory(torch.device(config.device)), run.peak_bytes
    start = time.perf_counter() - run.wall_seconds

    def measure() -> None:
        run.wall_seconds = time.perf_counter() - start
        growth = memory.growth()
        run.peak_bytes = growth if before is None or growth is None else max(before, growth)

    try:
        with _logging(folder, run, config) as log:
            for training in _steps(choice, config, text, run, checkpoint):
                log(run)
                show(run)
                stops = asked_to_stop()
                if folder is not None and (stops or config.saves(run.steps_taken)):
                    measure()
                    checkpoints.save(folder, run, *training, config.processes)
                if stops:
                    break
        run.status = "finished" if run.steps_taken == config.steps else "interrupted"
    except NotFiniteError:
        run.status = "diverged"
    except KeyboardInterrupt:
        run.status = "interrupted"
    measure()
    return run


def new_run(choice: Choice, config: TrainConfig) -> Run:
    """A run that has taken no step."""
    lr = dict(choice.swept).get("lr")
    source = "--sweep" if lr is not None else choice.default.source if config.lr is None else "--lr"
    return Run(
        choice.name,
        learning_rate(choice, config),
        source,
        config.model.parameters,
        config.tokens_per_step,
        settings={key: str(value) for key, value in choice.swept},
        fused=config.fused_backward and choice.can_fuse,
    )


@contextmanager
def _logging(folder: Path | None, run: Run, config: TrainConfig) -> Iterator[Callable[[Run], None]]:
    """What takes the run after each step: a log in the folder, in the first process."""
    if folder is None or config.processes.rank:
        yield lambda run: None
        return
    with Log(folder, run, [run.lr * config.rate(step) for step in range(config.steps)]) as log:
        yield log.show


def rehearse(choices: list[Choice], config: TrainConfig, text: Text) -> None:
    """Takes one step with each optimizer, on models that are thrown away.

    An argument that an optimizer rejects thus shows before any training (as ValueError), and what is paid once per
    process (thread pools, libraries' workspaces, kernel compilation) does not count against the first optimizer.
    """
    batch = next(_batches(config, text))
    for choice in choices:
        model = build_model(config)
        shared = config.processes.share_out(model, torch.device(config.device))
        optimizer = build_optimizer(choice, model, config)
        try:
            if config.fused_backward and choice.can_fuse:
                fuse(shared, optimizer, config)
            loss_of(shared, batch.tokens, batch.targets).backward()
            optimizer.step()
        except (RuntimeError, TypeError) as error:  # a backend that cannot run here, or shards that are not taken
            raise ValueError(f"{choice.name}: {error}") from error


def find_device(name: str) -> str:
    """The device to train on; `auto` prefers CUDA. Raises ValueError for one that this machine does not have."""
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = "cuda:0" if name == "cuda" else name
    if found not in available:
        raise ValueError(f"{name!r} is not available; this machine has {', '.join(available)}")
    return found


def learning_rate(choice: Choice, config: TrainConfig) -> float:
    """The peak learning rate: that of a sweep, or the same for all if the user gave one, else the optimizer's own."""
    lr = choice.default.lr if config.lr is None else config.lr
    return dict(choice.swept).get("lr", lr)


def build_model(config: TrainConfig) -> ByteModel:
    """The model that every optimizer starts from: equal seeds give equal parameters."""
    torch.manual_seed(config.seed)
    return ByteModel(config.model).to(config.device, DTYPES[config.dtype])


def build_optimizer(choice: Choice, model: ByteModel, config: TrainConfig) -> Optimizer:
    """The optimizer with its options; one that can clip gradients itself is told to. Raises ValueError."""
    options = dict(config.options)
    if config.clip_grad_norm:
        options["clip_grad_norm"] = config.clip_grad_norm
    return choice.build(model, learning_rate(choice, config), options)


def fuse(model: nn.Module, optimizer: Optimizer, config: TrainConfig) -> FusedBackward:
    """Make backward passes update the model."""
    return fuse_backward(model, optimizer, clip_grad_norm=config.clip_grad_norm or None)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], config: TrainConfig) -> float:
    """Mean loss over the batches, of which each process takes its share, in nats per byte."""
    shares = (config.processes.share_of(batch).to(torch.device(config.device)) for batch in batches)
    losses = [loss_of(model, share.tokens, share.targets) for share in shares]
    return config.processes.mean(torch.stack(losses).mean()).item()


def _batches(config: TrainConfig, text: Text, start: int = 0) -> Iterator[Batch]:
    device = torch.device(config.device)
    for batch in training_batches(text.training, config.batch_size, config.model.context, config.seed, start):
        yield config.processes.share_of(batch).to(device)


def _steps(
    choice: Choice, config: TrainConfig, text: Text, run: Run, checkpoint: Path | None
) -> Iterator[tuple[ByteModel, Optimizer]]:
    """Takes a step and adds it to the run, again and again; yields the model and its optimizer."""
    device = torch.device(config.device)
    model = build_model(config)
    # before the optimizer is made: a model that is sharded has other parameters
    shared = config.processes.share_out(model, device)
    optimizer = build_optimizer(choice, model, config)
    handle = fuse(shared, optimizer, config) if run.fused else None
    scheduler = LambdaLR(optimizer, config.rate)
    gradients = LiveGradients([*model.parameters()])
    if checkpoint is not None:
        checkpoints.load(checkpoint, model, optimizer, config.processes)
        scheduler.last_epoch = run.steps_taken
    # not the model's: between forward and backward passes those of FSDP2 are wholes, which it frees
    params = [param for group in optimizer.param_groups for param in group["params"]]
    clip_here = 0.0 if run.fused or choice.takes("clip_grad_norm") else config.clip_grad_norm
    validation = validation_batches(text.validation, config.batch_size, config.model.context, config.eval_batches)

    steps = range(run.steps_taken + 1, config.steps + 1)
    for taken, batch in zip(steps, _batches(config, text, run.steps_taken), strict=False):
        logs = taken % config.log_every == 0 or taken in (1, config.steps)
        updates = Updates(params) if logs else None
        start = now(device)
        loss = loss_of(shared, batch.tokens, batch.targets)
        loss.backward()
        norm = grad_norm(params) if logs and handle is None else None
        before = now(device)
        if clip_here:
            clip_grad_norm_(model.parameters(), clip_here)
        optimizer.step()
        after = now(device)
        optimizer.zero_grad()
        scheduler.step()
        # one step tells, and looking at all parameters again and again takes time
        gradients.remove()
        run.gradient_bytes = max(run.gradient_bytes, gradients.peak)
        training_loss = _finite(config.processes.mean(loss.detach()).item())
        step_ms = (now(device) - start) * 1e3
        evaluates = taken % config.eval_every == 0 or taken == config.steps
        validation_loss = _finite(evaluate(shared, validation, config)) if evaluates else None

        # all at once, so that a step that diverges or is cut short leaves nothing of itself
        run.training_loss.append(training_loss)
        run.step_ms.append(step_ms)
        run.optimizer_ms.append((after - before) * 1e3)
        run.state_bytes = state_bytes(optimizer)
        if validation_loss is not None:
            run.validation_loss.append((taken, validation_loss))
        if updates is not None:
            total, count = config.processes.mean(updates.sums()).tolist()
            norm = norm if handle is None else handle.grad_norm()
            for values, value in ((run.update_rms, math.sqrt(total / count)), (run.grad_norm, norm)):
                if value is not None and math.isfinite(value):
                    values.append((taken, float(value)))
        yield model, optimizer


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NotFiniteError
    return loss
