"""AdaLomo in the backward pass with Accelerate: python examples/accelerate_loop.py (needs pip install '.[hf]')

Fuse what `prepare` returns. With several processes that is a DistributedDataParallel; gradients are then averaged, some
at a time, before they are used: torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowmem_optim import AdaLomo, fuse_backward


def main(steps: int = 200) -> list[float]:
    """Train, and return the loss of each batch."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    torch.manual_seed(0)
    x = torch.randn(32 * 2 * steps, 2)
    data = DataLoader(TensorDataset(x, (x[:, :1] * x[:, 1:]).sin()), batch_size=32)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = AdaLomo(model.named_parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)

    # accelerator.clip_grad_norm_ would find no gradients: the bound is given here
    fuse_backward(model, optimizer, clip_grad_norm=1.0, accumulating=lambda: not accelerator.sync_gradients)
    losses = []
    for inputs, targets in data:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            # changes no parameter; here for the scheduler, and so that the loop also works without fuse_backward
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (%(default)s)")
    losses = main(parser.parse_args().steps)
    print(f"loss {sum(losses[:20]) / 20:.4f} at the start, {sum(losses[-20:]) / 20:.4f} at the end")
