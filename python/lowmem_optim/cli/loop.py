"""Trains one model with one optimizer, and measures it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowmem_kernels.testing.allocations import LiveGradients
from lowmem_optim import fuse_backward
from lowmem_optim.cli.data import Batch, Text, training_batches, validation_batches
from lowmem_optim.cli.measure import PeakMemory, now, state_bytes
from lowmem_optim.cli.model import ByteModel, ModelConfig, loss_of
from lowmem_optim.cli.processes import ALONE, Processes
from lowmem_optim.cli.registry import Choice

FINAL_LR = 0.1  # the cosine ends at this fraction of the learning rate
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """What every compared optimizer has in common; `clip_grad_norm` 0 means no clipping.

    `options` go to those optimizers that take them; `lr` None means each optimizer's own default. With `fused_backward`
    those of this package update inside the backward pass. `batch_size` is that of all `processes` together.
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
    fused_backward: bool = False
    processes: Processes = ALONE

    @property
    def tokens_per_step(self) -> int:
        """Bytes of text that one step trains on."""
        return self.batch_size * self.model.context


@dataclass
class Run:
    """One optimizer's training so far: losses in nats per byte, times in milliseconds, memory in bytes.

    `status` is "running", then "finished", "diverged" (a loss was not finite) or "interrupted" (by Ctrl-C).
    `validation_loss` holds (steps taken, loss) pairs; `gradient_bytes` are those of the gradients alive at a time, at
    most.
    """

    optimizer: str
    lr: float
    parameters: int
    tokens_per_step: int
    fused: bool = False
    status: str = "running"
    training_loss: list[float] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    state_bytes: int = 0
    gradient_bytes: int = 0
    peak_bytes: int | None = None
    wall_seconds: float = 0.0

    @property
    def final_loss(self) -> float | None:
        """The last validation loss; None for a run that diverged, or was interrupted before its first validation."""
        return self.validation_loss[-1][1] if self.validation_loss and self.status != "diverged" else None


class NotFiniteError(Exception):
    """The loss became infinite or not a number."""


def train(choice: Choice, config: TrainConfig, text: Text, show: Callable[[Run], None]) -> Run:
    """Trains a fresh model and calls `show` after every step; divergence and Ctrl-C end up in the run's status."""
    run = Run(
        choice.name,
        learning_rate(choice, config),
        config.model.parameters,
        config.tokens_per_step,
        fused=config.fused_backward and choice.can_fuse,
    )
    memory = PeakMemory(torch.device(config.device))
    start = time.perf_counter()
    try:
        _train(choice, config, text, run, show)
        run.status = "finished"
    except NotFiniteError:
        run.status = "diverged"
    except KeyboardInterrupt:
        run.status = "interrupted"
    run.wall_seconds = time.perf_counter() - start
    run.peak_bytes = memory.growth()
    return run


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
    """The peak learning rate: the same for all if the user gave one, else the optimizer's own."""
    return choice.learning_rate if config.lr is None else config.lr


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


def fuse(model: nn.Module, optimizer: Optimizer, config: TrainConfig) -> None:
    """Make backward passes update the model."""
    fuse_backward(model, optimizer, clip_grad_norm=config.clip_grad_norm or None)


def schedule(step: int, warmup: int, steps: int) -> float:
    """Fraction of the learning rate at a step from 0: linear over `warmup` steps, then a cosine down to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], config: TrainConfig) -> float:
    """Mean loss over the batches, of which each process takes its share, in nats per byte."""
    shares = (config.processes.share_of(batch).to(torch.device(config.device)) for batch in batches)
    losses = [loss_of(model, share.tokens, share.targets) for share in shares]
    return config.processes.mean(torch.stack(losses).mean()).item()


def _batches(config: TrainConfig, text: Text) -> Iterator[Batch]:
    device = torch.device(config.device)
    for batch in training_batches(text.training, config.batch_size, config.model.context, config.seed):
        yield config.processes.share_of(batch).to(device)


def _train(choice: Choice, config: TrainConfig, text: Text, run: Run, show: Callable[[Run], None]) -> None:
    device = torch.device(config.device)
    model = build_model(config)
    # before the optimizer is made: a model that is sharded has other parameters
    shared = config.processes.share_out(model, device)
    optimizer = build_optimizer(choice, model, config)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, config.warmup, config.steps))
    gradients = LiveGradients([*model.parameters()])
    if run.fused:
        fuse(shared, optimizer, config)
    clip_here = 0.0 if run.fused or choice.takes("clip_grad_norm") else config.clip_grad_norm
    validation = validation_batches(text.validation, config.batch_size, config.model.context, config.eval_batches)

    for taken, batch in zip(range(1, config.steps + 1), _batches(config, text), strict=False):
        start = now(device)
        loss = loss_of(shared, batch.tokens, batch.targets)
        loss.backward()
        before = now(device)
        if clip_here:
            clip_grad_norm_(model.parameters(), clip_here)
        optimizer.step()
        after = now(device)
        optimizer.zero_grad()
        scheduler.step()
        # one step tells, and looking at all parameters again and again takes time
        gradients.remove()
        run.gradient_bytes = gradients.peak
        run.training_loss.append(_finite(config.processes.mean(loss.detach()).item()))
        run.step_ms.append((now(device) - start) * 1e3)
        run.optimizer_ms.append((after - before) * 1e3)
        run.state_bytes = state_bytes(optimizer)
        if taken % config.eval_every == 0 or taken == config.steps:
            run.validation_loss.append((taken, _finite(evaluate(shared, validation, config))))
        show(run)


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NotFiniteError
    return loss
