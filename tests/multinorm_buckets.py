"""Buckets of tensors for the multi-normalization verbs. The same arguments make equal buckets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from buckets import FP32, SEED
from lowmem_kernels import Rounding
from lowmem_kernels.multinorm import NormRule, sinkhorn_update_
from lowmem_kernels.testing import Case, Precision, assert_same_bits, make_tensors

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
class Bucket:
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    cases: list[Case]
    precision: Precision

    def columns(self):
        """The lists in the order of NAMES."""
        return [getattr(self, name) for name in NAMES]

    def copies(self):
        """The lists, as contiguous clones."""
        return [[t.clone(memory_format=torch.contiguous_format) for t in column] for column in self.columns()]

    def only(self, indices):
        """A bucket of some of the same tensors."""
        return Bucket(*([x[i] for i in indices] for x in (*self.columns(), self.cases)), self.precision)

    def rounding(self, indices=None):
        # uids that use all 64 bits, the sign included
        indices = range(len(self.params)) if indices is None else indices
        return Rounding(self.precision.stochastic, SEED, [(-1) ** i * (i * (2**33 + 3) + 5) for i in indices])

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


def assert_same_buckets(actual, expected):
    """Every tensor of two buckets, or of two results of ``copies``, has the same bits."""
    actual, expected = (x.columns() if isinstance(x, Bucket) else x for x in (actual, expected))
    for name, column, other in zip(NAMES, actual, expected, strict=True):
        for i, (a, b) in enumerate(zip(column, other, strict=True)):
            assert_same_bits(a, b, f"{name}[{i}]")
