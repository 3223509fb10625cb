"""Learning rates that change, as numbers and as tensors."""

import pytest
import torch
from torch.optim import lr_scheduler

from optim.every import both_dtypes, cases_with_lr
from optim.tensors import SMALL, assert_same_bits, assert_same_values, copies, make_params, take_steps

SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=10, cycle_momentum="betas" in optimizer.defaults
    ),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.7)],
        milestones=[3],
    ),
}


def run_scheduled(case, dtype, make_scheduler, wrap_lr):
    """(parameters, optimizer, options of each step) of a run with a scheduler."""
    params = make_params(dtype, SMALL)
    optimizer = case.make(params, lr=wrap_lr(case.options["lr"]))
    scheduler = make_scheduler(optimizer)
    options = []
    for step in range(8):
        options.append({k: v for k, v in optimizer.param_groups[0].items() if k in optimizer.defaults})
        take_steps(optimizer, params, 1, first=step)
        scheduler.step()
    return params, optimizer, options


@pytest.mark.parametrize("name", SCHEDULERS)
@cases_with_lr
def test_every_step_reads_the_options_of_its_group(case, name):
    """Each step equals one of an optimizer whose lr (and betas, for OneCycleLR) are written by hand."""
    params, _, options = run_scheduled(case, torch.float32, SCHEDULERS[name], float)
    others = make_params(names=SMALL)
    plain = case.make(others)
    for step, values in enumerate(options):
        plain.param_groups[0].update(values)
        take_steps(plain, others, 1, first=step)
    assert len({values["lr"] for values in options}) >= 7
    assert_same_bits(params, others)
    constant = make_params(names=SMALL)
    take_steps(case.make(constant), constant, len(options))
    assert all(not torch.equal(p, q) for p, q in zip(params, constant, strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
@both_dtypes
@cases_with_lr
def test_lr_in_a_tensor_equals_a_number(case, name, dtype):
    """A float32 tensor holds lr to 2**-25, so float32 parameters are 50 spacings of the way they went apart at most.

    bfloat16: nearly always the same bits (a rounding threshold lies in between for about one write in 10**5).
    """
    numbers, _, _ = run_scheduled(case, dtype, SCHEDULERS[name], float)
    tensors, optimizer, _ = run_scheduled(case, dtype, SCHEDULERS[name], lambda lr: torch.tensor(lr))
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    for p, q, start in zip(numbers, tensors, make_params(dtype, SMALL), strict=True):
        if dtype is torch.float32:
            assert (p - q).norm() <= 50 * 2**-24 * ((p - start).norm() + p.norm())
        else:
            assert (p != q).double().mean() <= 0.01


@both_dtypes
@cases_with_lr
def test_exact_tensor_lr_gives_the_bits_of_the_number(case, dtype):
    results = []
    for lr in (2**-6, torch.tensor(2**-6), torch.tensor([2**-6]), torch.tensor(2**-6, dtype=torch.float64)):
        params = make_params(dtype, SMALL)
        take_steps(case.make(params, lr=lr), params, 3)
        results.append(copies(params))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@cases_with_lr
def test_capturable_keeps_lr_in_a_tensor_on_the_parameters_device(case):
    params, others = make_params(names=SMALL), make_params(names=SMALL)
    optimizer, plain = case.make(params, lr=2**-6, capturable=True), case.make(others, lr=2**-6)
    lr = optimizer.param_groups[0]["lr"]
    assert (lr.dtype, lr.shape, lr.device) == (torch.float32, (), params[0].device)
    take_steps(optimizer, params, 2)
    take_steps(plain, others, 2)
    assert_same_bits(params, others)
    lr.fill_(2**-4)
    plain.param_groups[0]["lr"] = 2**-4
    take_steps(optimizer, params, 2, first=2)
    take_steps(plain, others, 2, first=2)
    assert_same_bits(params, others)
    given = torch.tensor(0.5)
    assert case.make(params, lr=given, capturable=True).param_groups[0]["lr"] is given


@cases_with_lr
def test_keys_that_schedulers_leave_are_accepted_in_new_groups(case):
    """Trainers rebuild optimizers from the groups of another one."""
    _, optimizer, _ = run_scheduled(case, torch.float32, SCHEDULERS["one-cycle"], float)
    again = case.optimizer(optimizer.param_groups)
    keys = {"initial_lr", "max_lr", "min_lr"}
    assert keys <= set(again.param_groups[0])
    for key in set(optimizer.param_groups[0]) - {"params"}:
        assert_same_values(again.param_groups[0][key], optimizer.param_groups[0][key])
