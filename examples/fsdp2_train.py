"""Train a model that FSDP2 shards: torchrun --standalone --nproc-per-node 2 examples/fsdp2_train.py runs/fsdp2

On NVIDIA GPUs with NCCL, elsewhere on CPUs with gloo. It saves a checkpoint in the folder, if there is one, and starts
from the last that is there, which any other number of processes may have left.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowmem_optim import AdamW


def batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, and which of 8 sectors they point to: others in each process."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    x = torch.randn(256, 2, generator=generator)
    return x.to(device), (torch.atan2(x[:, 0], x[:, 1]) / torch.pi * 4).floor().long().to(device) % 8


def main(folder: str | None = None, steps: int = 100) -> None:
    """Train, and print the loss of the first process."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = torch.device(kind, dist.get_node_local_rank()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # after sharding: these are the parameters that there are from now on
    optimizer = AdamW(model.named_parameters(), lr=3e-3, skip_nonfinite="step")
    start = 0 if folder is None else load_last(Path(folder), model, optimizer)
    for step in range(start, start + steps):
        x, y = batch(step, device)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step in (start, start + steps - 1):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    if folder is not None:
        # a folder of its own: the last checkpoint stays as it is whatever happens now
        dcp.save(state_of(model, optimizer), checkpoint_id=Path(folder, str(start + steps)))
    # nobody leaves before all are done
    dist.barrier()
    dist.destroy_process_group()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def load_last(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last complete checkpoint, if there is one, and return the step that is next."""
    # what is written last
    steps = [int(metadata.parent.name) for metadata in folder.glob("*/.metadata")]
    if not steps:
        return 0
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / str(max(steps)))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # gloo's threads now and then abort an interpreter that shuts down around them
    os._exit(0)
