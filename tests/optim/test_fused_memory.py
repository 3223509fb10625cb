"""How many gradients are alive at a time in a fused backward pass, and what waits for what."""

import pytest
import torch
from torch import nn

from lowmem_kernels.testing.allocations import Allocations, LiveGradients
from lowmem_kernels.testing.fake_driver import fake_driver
from lowmem_optim import Lomo, SinkGD, fuse_backward
from lowmem_optim.cli.model import ByteModel, ModelConfig
from optim.fused import Net, adalomo
from optim.test_steady_state import calls_in


def byte_model(layers=24):
    torch.manual_seed(0)
    return ByteModel(ModelConfig.from_width(layers, 32, 8)), torch.randint(0, 256, (1, 8))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "make", [adalomo, lambda m: SinkGD(m.named_parameters(), lr=1e-2)], ids=["one-rule", "two-rules"]
)
def test_live_gradients_of_24_layers_are_at_most_those_of_the_two_largest_parameters(make, exact):
    model, tokens = byte_model()
    live = LiveGradients(list(model.parameters()))
    optimizer = make(model)
    handle = fuse_backward(model, optimizer, clip_grad_norm=1.0)
    steps = []
    optimizer_update = optimizer.update
    optimizer.update = lambda bucket: steps.append(len(bucket.params)) or optimizer_update(bucket)
    for _ in range(2):
        handle.backward(model.loss(tokens, tokens), exact=exact)
    largest = sorted((p.nbytes for p in model.parameters()), reverse=True)[:2]
    layer = sum(p.nbytes for p in model.blocks[0].parameters())
    assert 0 < live.peak <= sum(largest) <= 2 * layer
    # every parameter in every step, small ones together with others
    count = len(list(model.parameters()))
    assert sum(steps) == 2 * count
    assert len(steps) < 2 * count
    assert len(handle._groups._known) == len(steps) / 2


def test_allocated_bytes_of_a_backward_pass():
    """By a tracker of all tensors: gradients, activations' gradients and what the reference needs for a parameter."""
    peaks = {}
    for fused in (False, True):
        model, tokens = byte_model()
        optimizer = adalomo(model)
        if fused:
            fuse_backward(model, optimizer)
        optimizer.init_state()
        loss = model.loss(tokens, tokens)
        with Allocations() as allocations:
            loss.backward()
        peaks[fused], left = allocations.peak, allocations.now
        parameters = sum(p.nbytes for p in model.parameters())
        # RMS(p) of each parameter stays, and how many NaN and Inf there were
        assert left == (4 * len(list(model.parameters())) + 8 if fused else parameters)
    assert parameters <= peaks[False] < 1.05 * parameters
    # 24 layers: two of them are a twelfth
    assert peaks[True] < parameters / 6


def test_gradients_wait_for_no_more_bytes_than_allowed(monkeypatch):
    """With a tiny limit every parameter is updated alone; a large one is cut to the second largest parameter."""
    sizes = []
    for limit in (1, 1 << 30):
        monkeypatch.setattr("lowmem_optim.fused_groups.GROUP_BYTES", limit)
        model = Net()
        optimizer = adalomo(model)
        fuse_backward(model, optimizer)
        sizes.append([])
        update = optimizer.update
        optimizer.update = lambda bucket, update=update: sizes[-1].append(len(bucket.params)) or update(bucket)
        model.loss().backward()
    assert sizes[0] == [1] * 6
    assert sum(sizes[1]) == 6
    assert len(sizes[1]) < 6


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}], ids=str)
def test_host_work_of_a_gradient_does_not_grow_with_the_number_of_parameters(options):
    """Python and C functions that a backward pass calls, for each parameter; nothing is launched for real."""
    counts = {}
    with fake_driver():
        for count in (20, 200):
            params = [nn.Parameter(torch.ones(4, 64 if i % 3 else 256)) for i in range(count)]
            model = nn.ParameterList(params)
            optimizer = Lomo(params, backend="triton")
            fuse_backward(model, optimizer, **options)
            for _ in range(2):
                sum(p.sum() for p in params).backward()
            loss = sum(p.sum() for p in params)
            counts[count] = calls_in(loss.backward) / count
    assert counts[200] <= counts[20]
