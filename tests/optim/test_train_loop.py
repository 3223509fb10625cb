"""What `lowmem train` measures, its schedule, and who clips gradients."""

import pytest
import torch

from lowmem_optim.cli import loop
from lowmem_optim.cli.data import Text
from lowmem_optim.cli.measure import PeakMemory, state_bytes
from lowmem_optim.cli.model import ModelConfig
from lowmem_optim.cli.plot import smoothed
from lowmem_optim.cli.registry import Choice

CONFIG = loop.TrainConfig(
    model=ModelConfig.from_width(layers=1, dim=32, context=8),
    steps=2,
    batch_size=2,
    lr=0.1,
    warmup=0,
    clip_grad_norm=0.5,
    seed=0,
    dtype="fp32",
    device="cpu",
    eval_every=1,
    eval_batches=1,
    options={},
)
CPU = torch.device("cpu")
MIB = 2**20


class FusedClipping(torch.optim.SGD):
    """Stands for an optimizer that clips gradients itself."""

    def __init__(self, params, lr=0.1, clip_grad_norm=None):
        super().__init__(params, lr=lr)
        self.clip_grad_norm = clip_grad_norm


def test_schedule_rises_then_falls_to_a_tenth():
    rates = [loop.schedule(step, warmup=4, steps=104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("cls", "clipped_by_torch"), [(FusedClipping, 0), (torch.optim.SGD, 2)])
def test_an_optimizer_that_clips_is_left_to_do_so(monkeypatch, cls, clipped_by_torch):
    norms = []
    monkeypatch.setattr(loop, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    data = torch.arange(64, dtype=torch.uint8)
    run = loop.train(Choice("it", cls), CONFIG, Text(data, data, "numbers", 1), lambda run: None)
    assert run.status == "finished"
    assert norms == [0.5] * clipped_by_torch


def test_fused_clipping_gets_the_limit():
    optimizer = loop.build_optimizer(Choice("it", FusedClipping), loop.build_model(CONFIG), CONFIG)
    assert optimizer.clip_grad_norm == 0.5


def test_every_optimizer_starts_from_the_same_parameters():
    one, two = loop.build_model(CONFIG), loop.build_model(CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_state_bytes():
    parameter = torch.nn.Parameter(torch.ones(10))
    parameter.grad = torch.ones(10)
    optimizer = torch.optim.Adam([parameter])
    assert state_bytes(optimizer) == 0
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 40 + 4  # two moments and a step counter


def test_peak_memory_counts_what_was_freed_since_and_nothing_from_before():
    before = torch.ones(16 * MIB)
    memory = PeakMemory(CPU)
    if memory.growth() is None:
        pytest.skip("this operating system does not tell a process's peak memory")
    del before
    torch.ones(8 * MIB)  # 32 MiB, below the 64 MiB given up
    assert memory.growth() < 4 * MIB
    memory = PeakMemory(CPU)
    torch.ones(16 * MIB)
    assert 63 * MIB < memory.growth() < 72 * MIB  # the kernel counts pages in batches: a little off


def test_smoothing_has_no_bias_at_the_start():
    assert smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smoothed([5.0, 1.0]) == [5.0, 1.0]
