"""One of two processes that train replicas of a model: python replicas_worker.py RANK FILE."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import optim.worker as worker
from lowmem_optim import AdaLomo, AdamW, fuse_backward
from optim.tensors import assert_same_bits, copies

RANK = int(sys.argv[1])
STEPS = 3


def make_model(start=0):
    torch.manual_seed(start)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    )


def loss_of(model, step):
    """Of other data in each process."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + RANK))
    return model(x).square().mean()


def train(mode, make=AdaLomo, micro_batches=1, **options):
    """Parameters and buffers after some steps; "unfused" is DistributedDataParallel with an ordinary step."""
    # a wrapper sends the first process's parameters to the others
    model = make_model(0 if mode == "group" else RANK)
    wrapped = model if mode == "group" else DistributedDataParallel(model)
    optimizer = make(model.named_parameters(), lr=1e-2)
    handle = None
    if mode != "unfused":
        handle = fuse_backward(
            wrapped, optimizer, process_group=dist.group.WORLD if mode == "group" else None, **options
        )
    for step in range(STEPS):
        for i in range(micro_batches - 1):
            with wrapped.no_sync() if handle is None else handle.accumulate():
                loss_of(wrapped, step + 10 * i + 10).backward()
        if handle is None:
            loss_of(wrapped, step).backward()
            if "clip_grad_norm" in options:
                nn.utils.clip_grad_norm_(model.parameters(), options["clip_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
        else:
            handle.backward(loss_of(wrapped, step), exact="clip_grad_norm" in options)
            assert all(p.grad is None for p in model.parameters())
    return copies(model.parameters()), copies(model.buffers())


def gathered(tensors):
    flat = torch.cat([t.double().flatten() for t in tensors])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    return others


def averages_equal_those_of_the_wrapper():
    for make in (AdaLomo, AdamW):
        expected, buffers = train("unfused", make)
        for mode in ("wrapper", "group"):
            found, others = train(mode, make)
            # (a + b) / 2 and a / 2 + b / 2 of float32 are the same
            assert_same_bits(found, expected)
            assert torch.equal(*gathered(found))
            if mode == "wrapper":
                assert_same_bits(others, buffers)


def micro_batches_and_norms():
    expected, _ = train("unfused", AdamW, micro_batches=3)
    assert_same_bits(train("wrapper", AdamW, micro_batches=3)[0], expected)
    for micro_batches in (1, 2):
        expected, _ = train("unfused", AdamW, micro_batches, clip_grad_norm=0.01)
        found, _ = train("group", AdamW, micro_batches, clip_grad_norm=0.01)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def a_wrapper_averages_again_after_the_handle_is_gone():
    wrapped = DistributedDataParallel(make_model())
    optimizer = AdaLomo(wrapped.module.named_parameters())
    with fuse_backward(wrapped, optimizer):
        loss_of(wrapped, 0).backward()
    loss_of(wrapped, 1).backward()
    assert torch.equal(*gathered([p.grad for p in wrapped.parameters()]))


def nobody_averages():
    model = make_model()
    fuse_backward(model, AdaLomo(model.parameters()))
    with pytest.raises(RuntimeError, match="there are 2 processes and nothing averages their gradients"):
        loss_of(model, 0).backward()


def different_parameters():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    fuse_backward(model, AdaLomo(model.named_parameters()), process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="processes have updated different parameters"):
        model[RANK](torch.ones(2, 3)).sum().backward()


def main():
    averages_equal_those_of_the_wrapper()
    micro_batches_and_norms()
    a_wrapper_averages_again_after_the_handle_is_gone()
    nobody_averages()
    different_parameters()


if __name__ == "__main__":
    worker.run(main, RANK, 2, meeting=sys.argv[2])
