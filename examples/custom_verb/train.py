"""A kernel of one's own from the rule to a training run: python examples/custom_verb/train.py

lion_kernels/ is a family of one verb, Lion's update: reference.py in torch, kernels.py in Triton, launch.py. lion.py is
the optimizer. On a CPU it trains by the reference. With TRITON_INTERPRET=1 before the command it then trains by the
kernel, in Triton's interpreter, and compares all bits. On a GPU it does so without the interpreter; that has not been
run, the kernel has only been compiled for GPUs.
"""

import argparse

import torch
from lion import Lion
from torch import Tensor, nn

from lowmem_kernels import why_not_triton


def batch(step: int, device: str) -> tuple[Tensor, Tensor]:
    """Numbers, and which of 8 sectors they point to."""
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(step))
    y = (torch.atan2(x[:, 0], x[:, 1]) / torch.pi * 4).floor().long() % 8
    return x.to(device, torch.bfloat16), y.to(device)


def train(backend: str, steps: int, device: str) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Train from the same start by a backend; return the losses, the parameters and their momenta."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 8)).to(device, torch.bfloat16)
    optimizer = Lion(model.named_parameters(), lr=0.02, weight_decay=0.01, backend=backend)
    losses = []
    for step in range(steps):
        x, y = batch(step, device)
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    params = list(model.parameters())
    print(f"{backend}: loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    return losses, params, [optimizer.state[p]["exp_avg"] for p in params]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bfloat16 tensors, whose -0.0 is not 0.0 here."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def main(steps: int = 30) -> list[float]:
    """Train by each backend that can run here, compare them, and return the reference's losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses, params, momenta = train("torch", steps, device)
    size = sum(m.nbytes for m in momenta) / sum(p.numel() for p in params)
    print(f"{size:g} bytes of state for each parameter")
    reason = why_not_triton(params)
    if reason is not None:
        print(f"triton does not run: {reason}")
        return losses
    _, *others = train("triton", steps, device)
    if not all(map(same_bits, [*params, *momenta], [*others[0], *others[1]])):
        raise SystemExit("the kernel's parameters or momenta have other bits than the reference's")
    print("the kernel's parameters and momenta have the bits of the reference's")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
