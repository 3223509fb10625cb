"""Backward passes with given gradients, and comparing runs that update in them with runs that do not."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_optim import AdaLomo, fuse_backward
from optim.tensors import SMALL, assert_same_bits, assert_same_states, gradient, make_named_params, states_of


class Weights(nn.Module):
    """A module with a parameter of each layout."""

    def __init__(self, dtype=torch.float32, names=SMALL):
        super().__init__()
        for name, param in make_named_params(dtype, names).items():
            self.register_parameter(name, param)

    def loss(self, step: int, spoil: str = "", size: float = 1.0, indices=None) -> Tensor:
        """``sum(p * c)`` in float32, whose gradients are the c of `gradient` exactly, of those at ``indices``."""
        terms = []
        for i, (name, param) in enumerate(self.named_parameters()):
            if indices is None or i in indices:
                c = gradient(param, step, i).float() * size
                if name == spoil:
                    c.view(-1)[3] = float("inf")
                terms.append((param.float() * c).sum())
        return sum(terms)


def run(case, fused, dtype=torch.float32, names=SMALL, steps=4, backward=None, groups=False, options=None, **fuse):
    """(model, optimizer, handle or None) after some steps; ``backward(model, handle, step)`` is one backward pass."""
    model = Weights(dtype, names)
    make = case.make_groups if groups else case.make
    optimizer = make(list(model.named_parameters()), **(options or {}))
    handle = fuse_backward(model, optimizer, **fuse) if fused else None
    carry_on(model, optimizer, handle, range(steps), backward)
    return model, optimizer, handle


def carry_on(model, optimizer, handle, steps, backward=None):
    for step in steps:
        if handle is None or backward is None:
            model.loss(step).backward()
        else:
            backward(model, handle, step)
        if handle is not None:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def assert_same_runs(some, others):
    """Parameters and states have the same bits."""
    (model, optimizer, _), (other_model, other_optimizer, _) = some, others
    params, other_params = list(model.parameters()), list(other_model.parameters())
    assert_same_bits(params, other_params)
    assert_same_states(states_of(optimizer, params), states_of(other_optimizer, other_params))


class Net(nn.Module):
    """Some layers, two of which may share a weight, each of which may be checkpointed; dropout takes random numbers."""

    def __init__(self, tied=False, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if tied:
            self.second.weight = self.first.weight
        self.reentrant = reentrant

    def forward(self, x):
        for layer in (self.first, self.second):
            block = nn.Sequential(layer, nn.Tanh(), nn.Dropout(0.2))
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)

    def loss(self, step=0):
        torch.manual_seed(10 + step)
        return self(torch.randn(5, 6).requires_grad_()).square().mean()


def adalomo(model, lr=1e-2, **options):
    return AdaLomo(model.named_parameters(), lr=lr, **options)
