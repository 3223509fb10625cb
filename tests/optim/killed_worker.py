"""One of two processes, of which the second dies while both save: python killed_worker.py RANK PROCESSES FOLDER."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import optim.worker as worker
from lowmem_optim import CAME
from optim.sharded import Model, state_dicts

RANK, SIZE, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])


class DyingWriter(FileSystemWriter):
    """Writes its files, and kills the second process before anybody hears of them."""

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        written.wait()
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def main():
    model = Model(init_device_mesh("cpu", (SIZE,)), (Shard(0),))
    optimizer = CAME(model.named_parameters(), lr=1e-2)
    for step in range(2):
        model.step(optimizer, step)
    dcp.save(state_dicts(model, optimizer), checkpoint_id=FOLDER / "first")
    model.step(optimizer, 2)
    ends = [p.full_tensor() for p in model.parameters()]
    if RANK == 0:
        torch.save(ends, FOLDER / "third_step.pt")
    dcp.save(state_dicts(model, optimizer), storage_writer=DyingWriter(FOLDER / "second"))


if __name__ == "__main__":
    worker.run(main, RANK, SIZE, meeting=FOLDER / "meeting")
