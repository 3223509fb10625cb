"""Fine-tune with AdaLomo in the backward pass, in a loop of one's own: python examples/plain_loop.py

Gradients are used and freed as they arrive. Every backward pass is a step; four micro-batches make one here.
"""

import argparse

import torch
from torch import nn

from lowmem_optim import AdaLomo, fuse_backward

MICRO_BATCHES = 4


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, and which of 8 sectors they point to."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
    return x, (torch.atan2(x[:, 0], x[:, 1]) / torch.pi * 4).floor().long() % 8


def main(steps: int = 200) -> list[float]:
    """Train, and return the loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    optimizer = AdaLomo(model.named_parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    handle = fuse_backward(model, optimizer, clip_grad_norm=1.0)
    losses = []
    for step in range(steps):
        total = 0.0
        for i in range(MICRO_BATCHES):
            x, y = (tensor.to(device) for tensor in batch(MICRO_BATCHES * step + i))
            loss = nn.functional.cross_entropy(model(x), y) / MICRO_BATCHES
            if i < MICRO_BATCHES - 1:
                with handle.accumulate():
                    loss.backward()
            else:
                # the update; handle.backward(loss, exact=True) clips by the norm itself
                loss.backward()
            total += loss.item()
        scheduler.step()
        losses.append(total)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (%(default)s)")
    losses = main(parser.parse_args().steps)
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
