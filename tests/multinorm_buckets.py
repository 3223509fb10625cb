"""Buckets of tensors for the multi-normalization verbs. The same arguments make equal buckets."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from buckets import FP32, Lists, assert_same_lists
from lowmem_kernels.multinorm import NormRule, sinkhorn_update_
from lowmem_kernels.testing import Case, Precision, make_tensors

NAMES = ("params", "grads", "exp_avgs", "steps")
HYPER = dict(lr=2e-2, weight_decay=0.1)

#: Every kind of read: one and more sweeps, either end, single norms, a total, a sign, a clamp, momentum.
RULES = {
    "sinkgd": NormRule(scale=0.05),
    "once": NormRule(("row", "col")),
    "column_first": NormRule(("col", "row") * 2),
    "row": NormRule(("row",)),
    "col": NormRule(("col",)),
    "sign": NormRule(("sign",)),
    "frobenius": NormRule(("frobenius",)),
    "row_then_all": NormRule(("row", "frobenius")),
    "sign_then_all": NormRule(("col", "sign", "row", "col", "frobenius")),
    "clamped": NormRule(("row", "col") * 2, eps=1e-2),
    "table": NormRule(("row", "col") * 2 + ("row",), scale=0.18, row_threshold=0.5, momentum=0.9, nesterov=True),
    "momentum_before": NormRule(("row", "col"), momentum=0.9),
    "momentum_after": NormRule(("col", "row"), momentum=0.8, momentum_after=True, nesterov=True),
    "convolution": NormRule(("row", "col") * 2, conv=True),
}


@dataclass
class Bucket(Lists):
    names = NAMES
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    cases: list[Case]
    precision: Precision

    def run(self, rule, **options):
        options = {"rounding": self.rounding(), **HYPER, **options}
        exp_avgs = self.exp_avgs if rule.momentum else None
        sinkhorn_update_(self.params, self.grads, self.steps, rule=rule, exp_avgs=exp_avgs, **options)


def make_bucket(cases, precision=FP32, seed=0):
    """One parameter per case with a momentum of a run under way; every step counter differs."""
    bucket = Bucket([], [], [], [], list(cases), precision)
    for i, case in enumerate(cases):
        param, grad = make_tensors(case, precision.param, seed + i, grad_dtype=precision.grad)
        _, past = make_tensors(case, torch.float32, seed + i + 1000)
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.exp_avgs.append((3 * past).to(precision.state).clone(memory_format=torch.contiguous_format))
        bucket.steps.append(torch.tensor(float(3 * i)))
    return bucket


assert_same_buckets = partial(assert_same_lists, NAMES)
