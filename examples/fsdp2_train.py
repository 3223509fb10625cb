"""Train a language model that FSDP2 shards: torchrun --standalone --nproc-per-node 2 examples/fsdp2_train.py

It needs pip install '.[cli]', for the model and text of `lowmem train`. On NVIDIA GPUs with NCCL, elsewhere on CPUs
with gloo, by any optimizer of the package: `... fsdp2_train.py Adafactor runs/fsdp2`. Given a folder after its name, it
saves a checkpoint there, and starts from the last that is there, which any other number of processes may have left.
"""

import argparse
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

import lowmem_optim
from lowmem_optim.cli.data import load_text
from lowmem_optim.cli.model import ByteModel, ModelConfig

CONTEXT, SEQUENCES = 64, 8
#: of those whose learning rate is no Adam's
OPTIONS: dict[str, dict[str, Any]] = {
    "Adafactor": {"lr": 2e-3, "relative_step": False, "scale_parameter": False},
    "AdaLomo": {"lr": 0.05},
    "Lomo": {"lr": 0.5},
    "SinkGD": {"lr": 0.04},
    "SWAN": {"lr": 0.08},
}


def batch(text: torch.Tensor, step: int) -> torch.Tensor:
    """Some bytes of the text and the one after them: others in each process."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - CONTEXT, (SEQUENCES,), generator=generator)
    return text.unfold(0, CONTEXT + 1, 1)[starts].long()


def main(name: str = "AdamW", folder: str | None = None, steps: int = 50) -> None:
    """Train, and print the loss of the first process."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = torch.device(kind, dist.get_node_local_rank()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = ByteModel(ModelConfig.from_width(layers=2, dim=64, context=CONTEXT)).to(device)
    text = load_text(None, CONTEXT, max_bytes=1 << 20).training
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for layer in (*model.blocks, model):
        fully_shard(layer, mesh=mesh)
    # after sharding: these are the parameters that there are from now on
    optimizer = getattr(lowmem_optim, name)(lowmem_optim.split_params(model), **OPTIONS.get(name, {"lr": 3e-3}))
    start = 0 if folder is None else load_last(Path(folder), model, optimizer)
    for step in range(start, start + steps):
        sequences = batch(text, step).to(device)
        loss = model.loss(sequences[:, :-1], sequences[:, 1:])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", nargs="?", default="AdamW", help="by name (%(default)s)")
    parser.add_argument("folder", nargs="?", help="of checkpoints (none are kept)")
    parser.add_argument("--steps", type=int, default=50, help="updates (%(default)s)")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("RANK is not set; start it by torchrun, as --help says")
    main(args.optimizer, args.folder, args.steps)
    sys.stdout.flush()
    # gloo's threads now and then abort an interpreter that shuts down around them
    os._exit(0)
