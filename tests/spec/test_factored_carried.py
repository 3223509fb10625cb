"""The sum of p² that the torch reference hands from step to step stands for reading p, bit by bit."""

import math

import pytest
import torch

from lowmem_kernels.factored import FactoredRule, factored_update_
from lowmem_kernels.options import Rounding

SHAPES = [(), (7,), (5, 3), (1, 200001), (200001, 1), (700, 431), (4, 3, 5), (16, 8, 3, 3), (2, 300, 400), (0, 4)]


def tensors(dtype, strided):
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        yield x.mT.contiguous().mT if strided and x.ndim >= 2 else x


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize(
    ("dtype", "stochastic"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_carried_sum_is_the_sum_that_would_be_read(dtype, stochastic, beta1, strided):
    torch.manual_seed(0)
    params = list(tensors(dtype, strided))
    grads = [list(tensors(dtype, False)) for _ in range(4)]
    grads[1][2][0, 0] = math.nan  # skipped: the sum stays what it is
    results = []
    for sums in (None, [torch.tensor(math.nan) for _ in params]):
        own = [p.clone(memory_format=torch.preserve_format) for p in params]
        rows = [torch.zeros(p.shape[:-1] if p.ndim > 1 else p.shape) for p in own]
        cols = [torch.zeros(p.shape[:-2] + p.shape[-1:]) if p.ndim > 1 else None for p in own]
        exp_avgs = None if beta1 is None else [torch.zeros(p.shape) for p in own]
        steps = [torch.tensor(0.0) for _ in own]
        for grad in grads:
            factored_update_(
                own, grad, rows, cols, steps,
                lr=0.1, weight_decay=0.1, rule=FactoredRule(beta1=beta1), exp_avgs=exp_avgs, param_sums=sums,
                rounding=Rounding(stochastic=stochastic), backend="torch",
            )  # fmt: skip
        results.append(own)
        if sums is not None:
            for p, carried in zip(own, sums, strict=True):
                if p.numel():
                    assert carried.item() == pytest.approx(p.double().square().sum().item(), rel=1e-5)
    for read, carried in zip(*results, strict=True):
        assert torch.equal(read, carried)


def test_a_carried_sum_is_used_and_without_need_left_alone():
    def step(param_sum, **rule):
        p, sums = torch.full((4, 4), 2.0), [torch.tensor(param_sum)]
        state = [torch.zeros(4)], [torch.zeros(4)], [torch.tensor(0.0)]
        factored_update_(
            [p], [torch.ones(4, 4)], *state,
            lr=0.1, weight_decay=0.0, rule=FactoredRule(**rule), param_sums=sums, backend="torch",
        )  # fmt: skip
        return p[0, 0].item(), sums[0].item()

    assert step(math.nan) == pytest.approx((2 - 0.1 * 2, 16 * 1.8**2))
    assert step(16.0) == pytest.approx((2 - 0.1 * 1, 16 * 1.9**2))
    assert step(16.0, scale_parameter=False) == pytest.approx((2 - 0.1, 16.0))
