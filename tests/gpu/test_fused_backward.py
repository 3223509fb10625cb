"""The update in the backward pass on a real GPU: bits, memory, streams, nothing that waits for the device."""

import pytest
import torch
from torch import nn

from lowmem_optim import AdaLomo, AdamW, SinkGD, fuse_backward
from lowmem_optim.cli.model import ByteModel, ModelConfig

DEVICE = torch.device("cuda")
MAKERS = {
    "AdaLomo": lambda m: AdaLomo(m.named_parameters(), lr=1e-2),
    "AdamW": lambda m: AdamW(m.named_parameters(), lr=1e-3),
    "SinkGD": lambda m: SinkGD(m.named_parameters(), lr=1e-2),
}


def make_model(layers=4, width=128, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = ByteModel(ModelConfig.from_width(layers, width, 32)).to(DEVICE, dtype)
    return model, torch.randint(0, 256, (2, 32), device=DEVICE)


def weighted_sum(params, step):
    """Its gradients are given numbers, whatever a library adds up in which order."""
    generator = torch.Generator(DEVICE).manual_seed(step)
    return sum((p.float() * torch.randn(p.shape, device=DEVICE, generator=generator)).sum() for p in params)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("stream", [False, True])
def test_fused_equals_unfused(make, stream):
    results = []
    for fused in (True, False):
        model, _ = make_model()
        optimizer = make(model)
        if fused:
            fuse_backward(model, optimizer)
        with torch.cuda.stream(torch.cuda.Stream() if stream else torch.cuda.default_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for step in range(3):
                weighted_sum(list(model.parameters()), step).backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.cuda.synchronize()
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("exact", [False, True])
def test_memory_of_a_backward_pass(exact):
    """What torch's allocator has handed out at most: far less than a gradient for each parameter."""
    model, tokens = make_model(layers=24, width=512)
    handle = fuse_backward(model, AdaLomo(model.named_parameters()), clip_grad_norm=1.0)
    for _ in range(2):
        loss = model.loss(tokens, tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        handle.backward(loss, exact=exact)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < sum(p.nbytes for p in model.parameters()) / 4


@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_norm": 1.0, "loss_scale": "dynamic"}, {"clip_param_norm": 1.0}], ids=str
)
@pytest.mark.parametrize("exact", [False, True])
def test_a_pass_does_not_wait_for_the_device(options, exact):
    model, tokens = make_model()
    handle = fuse_backward(model, AdaLomo(model.named_parameters()), **options)
    for _ in range(2):
        handle.backward(model.loss(tokens, tokens), exact=exact)
    loss = model.loss(tokens, tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        handle.backward(loss, exact=exact)
        model.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_models_on_two_streams():
    """Autograd runs a layer's backward pass on the stream of its forward pass, and gradients wait across streams."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Linear(256, 256, device=DEVICE) for _ in range(4)])
        optimizer = AdaLomo(layers.named_parameters(), lr=1e-2)
        if fused:
            fuse_backward(layers, optimizer)
        side = torch.cuda.Stream()
        for step in range(3):
            x = torch.randn(8, 256, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(step))
            for i, layer in enumerate(layers):
                stream = side if i % 2 else torch.cuda.default_stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    x = layer(x).tanh()
                torch.cuda.current_stream().wait_stream(stream)
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        results.append([p.detach() for p in layers.parameters()])
    assert all(map(torch.equal, *results))
