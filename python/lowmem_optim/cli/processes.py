"""Several processes on this machine that train one model: each sees its share of every batch."""

import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lowmem_optim.cli.data import Batch
from lowmem_optim.cli.model import ByteModel

#: How long a process waits for others in a collective: one that has died lets the command fail earlier than that.
PATIENCE = timedelta(minutes=5)


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and what each has: "fsdp2" shards of the model, "ddp" a copy, "none" all alone."""

    count: int = 1
    sharding: str = "none"

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
        rank = dist.get_rank()
        return Batch(*(part.tensor_split(self.count)[rank] for part in (batch.tokens, batch.targets)))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value


#: a single process
ALONE = Processes()


def check_processes(count: int, batch_size: int, device: str) -> None:
    """Raises ValueError unless the batch can be shared out and every process has a device of its own."""
    if batch_size % count:
        raise ValueError(f"{count} does not divide --batch-size {batch_size}; each process takes as many sequences")
    if device.startswith("cuda") and count > torch.cuda.device_count():
        raise ValueError(f"{count} is more than this machine's {torch.cuda.device_count()} GPUs, of which each has one")


def run_in(count: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what ``work(rank, *arguments)`` returns in the first of several processes that form a process group.

    Where one fails, the others are stopped, and RuntimeError says what it said. Ctrl-C reaches them as it does this
    process, which waits for what the first makes of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        context = torch.multiprocessing.spawn(_work, (count, Path(folder), work, arguments), nprocs=count, join=False)
        assert context is not None
        done = False
        while not done:
            try:
                done = context.join()
            except KeyboardInterrupt:
                continue
            except (ProcessRaisedException, ProcessExitedException) as error:
                if not result.exists():
                    raise RuntimeError(f"a process has failed: {str(error).strip()}") from error
                break  # interrupted: the first has left, and others were waiting for it
        return pickle.loads(result.read_bytes())


def device_of(device: str, rank: int) -> str:
    """The device of a process: each has a GPU of its own."""
    return f"cuda:{rank}" if device.startswith("cuda") else device


def _work(rank: int, count: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=PATIENCE,
    )  # fmt: skip
    interrupted = []

    def interrupt(*_: object) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    result = work(rank, *arguments)
    if rank == 0:
        Path(folder, "part").write_bytes(pickle.dumps(result))
        Path(folder, "part").rename(Path(folder, "result"))
    if not interrupted:
        # nobody leaves before all are done; after Ctrl-C they are not where they would meet
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads now and then abort an interpreter that shuts down around them
    os._exit(0)
