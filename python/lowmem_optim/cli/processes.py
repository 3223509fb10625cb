"""Several processes on this machine that train one model: each sees its share of every batch."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import ProcessContext, ProcessExitedException, ProcessRaisedException

from lowmem_optim.cli.data import Batch
from lowmem_optim.cli.model import ByteModel

#: How long a process waits for others in a collective: one that has died lets the command fail earlier than that.
PATIENCE = timedelta(minutes=5)
#: Seconds that the others have to end by themselves after one has failed.
GRACE = 0.1

#: Signals that ask for an end after the step that is under way.
HEARD = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and what each has: "fsdp2" shards of the model, "ddp" a copy, "none" all alone."""

    count: int = 1
    sharding: str = "none"

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return dist.get_rank() if self.count > 1 else 0

    def share_out(self, model: ByteModel, device: torch.device) -> nn.Module:
        """The model as this process trains it. With FSDP2 its parameters are others from then on."""
        if self.sharding == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.sharding == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (self.count,))
            for layer in (*model.blocks, model):
                fully_shard(layer, mesh=mesh)
        return model

    def share_of(self, batch: Batch) -> Batch:
        """This process's part of a batch, which has as many sequences in all of them."""
        if self.count == 1:
            return batch
        return Batch(*(part.tensor_split(self.count)[self.rank] for part in (batch.tokens, batch.targets)))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value


#: a single process
ALONE = Processes()


class RefusedError(ValueError):
    """Some process cannot do what is asked for; the message says all there is to say."""


class ProcessFailedError(RuntimeError):
    """A process has raised, or ended; the message has its traceback."""


def check_processes(count: int, batch_size: int, device: str) -> None:
    """Raises ValueError unless the batch can be shared out and every process has a device of its own."""
    if batch_size % count:
        allowed = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise ValueError(f"{count} does not divide --batch-size {batch_size}; allowed: {allowed}")
    if device.startswith("cuda") and count > 1:
        gpus = torch.cuda.device_count()
        if count > gpus:
            raise ValueError(f"{count} is more than the GPUs here, of which each process has one; allowed: 1 to {gpus}")
        if device != "cuda:0":
            raise ValueError(f"{count} with --device {device}, which is one GPU; allowed: 1, or --device cuda")


def run_in(count: int, device: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what ``work(rank, asked_to_stop, *arguments)`` returns in the first of processes that form a group.

    They all call ``asked_to_stop()`` now and then, which is true in all of them after `hearing` has heard something. A
    second Ctrl-C stops them at once. Where one fails, the others are stopped, and ProcessFailedError says what it said,
    or RefusedError where it raised that.
    """
    interrupted = multiprocessing.get_context("spawn").Event()
    with tempfile.TemporaryDirectory() as folder, hearing(interrupted):
        context = _start(count, interrupted, device, Path(folder), work, arguments)
        try:
            # where one has failed, the others wait for it, and hear no SIGTERM
            while not context.join(grace_period=GRACE):
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            refusal = Path(folder, f"refusal-{error.error_index}")
            if refusal.exists():
                raise RefusedError(refusal.read_text(encoding="utf-8")) from error
            raise ProcessFailedError(f"a process has failed: {str(error).strip()}") from error
        finally:
            for process in context.processes:
                process.kill()
        return pickle.loads(Path(folder, "result").read_bytes())


def device_of(device: str, rank: int) -> str:
    """The device of a process: each has a GPU of its own."""
    return f"cuda:{rank}" if device.startswith("cuda") else device


@contextmanager
def hearing(interrupted: Event | threading.Event) -> Iterator[None]:
    """Ctrl-C, or SIGTERM, sets the event; a second one raises KeyboardInterrupt."""
    heard: list[bool] = []

    def hear(*_: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(True)
        interrupted.set()

    handlers = {number: signal.signal(number, hear) for number in HEARD}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(count: int, interrupted: Event, *details: Any) -> ProcessContext:
    # those who start now never hear Ctrl-C or SIGTERM, which terminals and schedulers send to all, and here they wait.
    # The event is older: with it came multiprocessing's tracker of resources, whose start would end that
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        context = torch.multiprocessing.spawn(_work, (count, interrupted, *details), nprocs=count, join=False)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    assert context is not None
    return context


def _asked_to_stop(interrupted: Event) -> bool:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # together, so that none waits for one that has left
    leave = torch.tensor(interrupted.is_set() or not parent.is_alive(), dtype=torch.int32)
    dist.all_reduce(leave)
    return bool(leave)


def _work(
    rank: int,
    count: int,
    interrupted: Event,
    device: str,
    folder: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=PATIENCE,
    )  # fmt: skip
    try:
        result = work(rank, partial(_asked_to_stop, interrupted), *arguments)
    except RefusedError as error:
        Path(folder, f"refusal-{rank}").write_text(str(error), encoding="utf-8")
        raise
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))
    # nobody leaves before all are done
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads now and then abort an interpreter that shuts down around them
    os._exit(0)
