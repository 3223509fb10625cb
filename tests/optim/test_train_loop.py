"""What `lowmem train` measures, its schedule, and who clips gradients."""

from dataclasses import replace

import pytest
import torch

from lowmem_optim.cli import loop
from lowmem_optim.cli.data import Text
from lowmem_optim.cli.measure import SAMPLED, PeakMemory, Updates, state_bytes
from lowmem_optim.cli.model import ModelConfig
from lowmem_optim.cli.plot import smoothed
from lowmem_optim.cli.registry import Choice
from lowmem_optim.cli.schedule import SHAPES, schedule

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


def test_schedules_rise_then_fall_to_the_fraction_that_is_left():
    def rates(shape):
        return [schedule(step, shape, warmup=4, steps=104, final=0.1) for step in range(105)]

    for shape in SHAPES:
        assert rates(shape)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates(shape)[4:] == sorted(rates(shape)[4:], reverse=True)
        assert rates(shape)[104] == pytest.approx(1.0 if shape == "constant" else 0.1)
    assert rates("cosine")[29] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)  # a quarter of the way
    assert rates("linear")[29] == pytest.approx(0.1 + 0.9 * 0.75)
    assert rates("constant")[103] == 1
    assert rates("wsd")[83] == 1
    assert rates("wsd")[94] == pytest.approx(0.1 + 0.9 / 2)


def test_norms_are_those_of_gradients_and_updates():
    """Gradient descent adds lr times the gradient, so that each norm tells the other."""
    config = replace(CONFIG, clip_grad_norm=0, lr=0.25, schedule="constant", steps=5, log_every=2)
    data = torch.arange(64, dtype=torch.uint8)
    run = loop.train(Choice("it", torch.optim.SGD), config, Text(data, data, "numbers", 1))
    assert [step for step, _ in run.grad_norm] == [step for step, _ in run.update_rms] == [1, 2, 4, 5]
    for (_, norm), (_, rms) in zip(run.grad_norm, run.update_rms, strict=True):
        # float32; p + update - p loses some digits of the update, by chance in both directions
        assert rms * run.parameters**0.5 == pytest.approx(0.25 * norm, rel=1e-4)


def test_updates_of_large_parameters_are_sampled():
    param = torch.zeros(10, 100 * SAMPLED)
    updates = Updates([param, torch.zeros(0)])
    param += torch.tensor([1.0, -3.0]).repeat(50 * SAMPLED)
    total, count = updates.sums().tolist()
    assert count == param.numel()
    # the mean of 1 and 9, whose deviation from it is 4: five times its standard error
    assert total / count == pytest.approx(5, abs=5 * 4 / SAMPLED**0.5)
    assert sum(len(before) for before in updates._before) == SAMPLED


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
