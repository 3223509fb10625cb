"""Trains one model with one optimizer in one way, and measures what it takes: a configuration of the headline section.

`headline.py` runs this, once for each configuration. The record, a JSON file, is written when one sequence has
been measured, and after each larger batch, so that whatever ends the process leaves what was known before.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gradient_memory import allocated_on
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem_kernels.testing.allocations import LiveGradients
from lowmem_optim import fuse_backward
from lowmem_optim.cli import registry
from lowmem_optim.cli.files import write_whole
from lowmem_optim.cli.measure import now, state_bytes
from lowmem_optim.fused_backward import FusedBackward

#: Small, so that random tokens leave random weights about as they are; it changes no time.
LR = 1e-5
#: Timed steps with one sequence, after two that do not count.
ROUNDS = 3
#: After an attempt that did not fit, memory is believed to be so much smaller: some of it lies in gaps.
BELIEVED = 0.98


@dataclass(frozen=True)
class Attempt:
    """Steps with a batch that fitted: sequences, bytes at the peak, milliseconds.

    reserved_bytes: by torch's allocator, gaps included; None on a CPU.
    optimizer_ms: of the step; in a fused backward pass, what it takes longer than one that only frees gradients; None
        where that was not measured.
    """

    batch: int
    peak_bytes: int
    reserved_bytes: int | None
    step_ms: float
    optimizer_ms: float | None
    tokens_per_s: float


@dataclass
class Record:
    """What is known so far: of live tensors in bytes, and attempts.

    status: "does not fit" until one sequence has, then "ran".
    largest_batch: the most sequences that fitted; least_too_many: the fewest that did not, None where none was found.
    """

    status: str = "does not fit"
    parameters: int | None = None
    gradients: int | None = None
    state: int | None = None
    one: Attempt | None = None
    largest: Attempt | None = None
    least_too_many: int | None = None
    free_bytes: int | None = None
    batches_tried: list[int] = field(default_factory=list)


class Trainer:
    """A Llama with random weights in bfloat16 and activation checkpointing, and the steps that it takes."""

    def __init__(
        self, config: LlamaConfig, choice: registry.Choice, options: dict[str, Any], fused: bool, device: torch.device
    ) -> None:
        self.device, self.fused, self.vocab = device, fused, config.vocab_size
        torch.manual_seed(0)
        with torch.device(device), _default_dtype(torch.bfloat16):
            self.model = LlamaForCausalLM(config)
        self.model.train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.params = [*self.model.parameters()]
        self.optimizer = choice.construct(self.model, {"lr": LR, **options})
        self.handle: FusedBackward | None = None
        self.resume()

    def resume(self) -> None:
        """Be ready for a step, also after one that has failed."""
        if self.handle is not None:
            self.handle.remove()
        self.optimizer.zero_grad()
        self.handle = fuse_backward(self.model, self.optimizer) if self.fused else None

    def step(self, batch: int, sequence: int) -> tuple[float, float]:
        """Take a step; returns its seconds, and those of the optimizer, 0 where that is in the backward pass."""
        start = now(self.device)
        self._loss(batch, sequence).backward()
        before = now(self.device)
        if self.handle is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = now(self.device)
        return end - start, end - before

    @contextmanager
    def without_updates(self) -> Iterator[None]:
        """Let backward passes free gradients as they arrive, and do nothing else with them."""
        assert self.handle is not None
        self.handle.remove()
        hooks = [param.register_post_accumulate_grad_hook(_free) for param in self.params]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.resume()

    def held(self) -> int:
        """Bytes of parameters and state, which are there between steps."""
        return self.parameter_bytes() + state_bytes(self.optimizer)

    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(param.nbytes for param in self.params)

    def _loss(self, batch: int, sequence: int) -> Tensor:
        tokens = torch.randint(self.vocab, (batch, sequence), device=self.device)
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss


def _free(param: Tensor) -> None:
    param.grad = None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attempt(trainer: Trainer, batch: int, sequence: int, memory: int | None) -> Attempt:
    """Take a step with a batch. Raises torch.OutOfMemoryError; on a CPU for what is more than ``memory``.

    On a CPU counting bytes takes most of the time.
    """
    device, before = trainer.device, trainer.held()
    with allocated_on(device) as allocations:
        seconds, own = trainer.step(batch, sequence)
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        peak, reserved = before + allocations.peak, None
        if memory is not None and peak > memory:
            raise torch.OutOfMemoryError(f"{peak} bytes at the peak, more than {memory}")
    return timed(Attempt(batch, peak, reserved, 0.0, None, 0.0), sequence, seconds, None if trainer.fused else own)


def timed(found: Attempt, sequence: int, seconds: float, own: float | None) -> Attempt:
    """Return an attempt with the seconds of its step, and of the optimizer."""
    own_ms = None if own is None else 1e3 * own
    return replace(found, step_ms=1e3 * seconds, optimizer_ms=own_ms, tokens_per_s=found.batch * sequence / seconds)


def measure_one(trainer: Trainer, sequence: int, memory: int | None, record: Record) -> None:
    """Measure with one sequence: live tensors in a first step, times in later ones."""
    record.parameters = trainer.parameter_bytes()
    gradients = LiveGradients(trainer.params)
    if trainer.fused:
        trainer.resume()  # hooks that count come before those that update
    try:
        record.one = attempt(trainer, 1, sequence, memory)
    finally:
        gradients.remove()
    record.gradients, record.state = gradients.peak, state_bytes(trainer.optimizer)
    record.status = "ran"
    # once more, since the first step compiles and makes the state
    found = attempt(trainer, 1, sequence, memory)
    seconds, own = median_step(trainer, sequence)
    if trainer.fused:
        with trainer.without_updates():
            own = seconds - median_step(trainer, sequence)[0]
    record.one = timed(found, sequence, seconds, own)


def median_step(trainer: Trainer, sequence: int) -> tuple[float, float]:
    """Return the median seconds of a step with one sequence, and of the optimizer in it."""
    steps, own = zip(*(trainer.step(1, sequence) for _ in range(ROUNDS)), strict=True)
    return statistics.median(steps), statistics.median(own)


def search(
    trainer: Trainer,
    sequence: int,
    memory: int | None,
    free: int,
    each: int,
    until: float,
    record: Record,
    save: Callable[[], None],
) -> None:
    """Look for the largest batch, as long as an attempt would be done by ``until`` (time.time).

    free: bytes that there are for tensors. each: bytes that a sequence is planned to take.
    """
    assert record.one is not None
    record.largest = fits = record.one
    fails: int | None = None
    while fails is None or fails > fits.batch + 1:
        if fits.batch > 1:
            # where it takes less than planned the plan stays, since at small batches the peak is elsewhere
            each = max(each, (fits.peak_bytes - record.one.peak_bytes) // (fits.batch - 1))
        batch = max(fits.batch + 1, fits.batch + int((free - fits.peak_bytes) // each))
        batch = batch if fails is None else min(batch, fails - 1)
        if time.time() + fits.step_ms / 1e3 * batch / fits.batch > until:
            break
        record.batches_tried.append(batch)
        try:
            fits = record.largest = attempt(trainer, batch, sequence, memory)
        except RuntimeError as error:
            check_memory(error)
            print(f"batch {batch}: {error}", flush=True)
            fails = record.least_too_many = batch
            free = int(BELIEVED * free)
        if fails == batch:  # not above, where the traceback holds tensors
            trainer.resume()
            give_back(trainer.device)
        save()


def check_memory(error: RuntimeError) -> None:
    """Raise the error again unless it says that memory is not enough, which libraries say in their own ways."""
    if not isinstance(error, torch.OutOfMemoryError) and not any(
        text in str(error) for text in ("out of memory", "ALLOC_FAILED")
    ):
        raise error


def give_back(device: torch.device) -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(
    model: Annotated[Path, typer.Option(help="config.json of a Llama of transformers.")],
    out: Annotated[Path, typer.Option(help="File for the record.")],
    optimizer: Annotated[str, typer.Option(help="As in lowmem plan.")],
    until: Annotated[float, typer.Option(help="Seconds since the epoch, after which no larger batch is tried.")],
    sequence_bytes: Annotated[int, typer.Option(help="Bytes that a sequence is planned to take.", min=1)],
    options: Annotated[str, typer.Option(help="Arguments of the optimizer, in JSON.")] = "{}",
    fused: Annotated[bool, typer.Option("--fused", help="Update inside the backward pass.")] = False,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 2048,
    memory: Annotated[int | None, typer.Option(help="Bytes to do with, instead of all.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
) -> None:
    """Measure one configuration."""
    place, record = torch.device(device), Record()
    if place.type == "cpu":
        torch.set_num_threads(1)
        if memory is None:
            raise typer.BadParameter("a CPU needs --memory")

    def save() -> None:
        write_whole(out, json.dumps(asdict(record), indent=1) + "\n")

    if place.type == "cuda":
        record.free_bytes, total = torch.cuda.mem_get_info(place)
        if memory is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), place)
    free = min(size for size in (record.free_bytes, memory) if size is not None)
    save()
    try:
        trainer = Trainer(
            LlamaConfig.from_json_file(model), registry.find(optimizer), json.loads(options), fused, place
        )
        measure_one(trainer, sequence, memory, record)
    except RuntimeError as error:
        check_memory(error)
        print(error, flush=True)
        save()
        return
    save()
    search(trainer, sequence, memory, free, sequence_bytes, until, record, save)


if __name__ == "__main__":
    typer.run(main)
