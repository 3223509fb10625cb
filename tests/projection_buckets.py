"""Buckets of tensors for the projection verbs. The same arguments make equal buckets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from buckets import FP32, SEED
from lowmem_kernels import Rounding
from lowmem_kernels.projection import ApolloRule, Draw, apollo_update_
from lowmem_kernels.projection.rule import moment_shape, norm_shape
from lowmem_kernels.testing import Case, Precision, assert_same_bits, make_tensors

NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "norms", "epochs", "steps")
HYPER = dict(lr=2e-2, weight_decay=0.1)

#: Ranks by sums and by products, both scalings, both sides, limits and none.
RULES = {
    "mini": ApolloRule(1, "tensor", 128.0),
    "one_channel_each": ApolloRule(1, proj_type="reverse_std"),
    "rank_4": ApolloRule(4),
    "rank_20_left": ApolloRule(20, "tensor", 4.0, "left", growth_limit=None),
    "rank_24": ApolloRule(24, proj_type="right", betas=(0.0, 0.9), eps=1e-3),
    "convolution": ApolloRule(5, conv=True),
    "full": ApolloRule(10**6),
}


@dataclass
class Bucket:
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    norms: list[Tensor]
    epochs: list[Tensor]
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

    def uids(self, indices=None):
        # that use all 64 bits, the sign included
        indices = range(len(self.params)) if indices is None else indices
        return [(-1) ** i * (i * (2**33 + 3) + 5) for i in indices]

    def run(self, rule, uids=None, epoch=3, source="gaussian", **options):
        uids = self.uids() if uids is None else uids
        draw = Draw(source, SEED, uids, epoch)
        options = {"rounding": Rounding(self.precision.stochastic, SEED, uids), **HYPER, **options}
        apollo_update_(*self.columns(), rule=rule, draw=draw, **options)


def make_bucket(cases, rule, precision=FP32, seed=0):
    """One parameter per case with moments of a run under way; every step counter differs."""
    bucket = Bucket([], [], [], [], [], [], [], list(cases), precision)
    for i, case in enumerate(cases):
        generator = torch.Generator().manual_seed(seed + i)
        param, grad = make_tensors(case, precision.param, seed + i, grad_dtype=precision.grad)
        past = 1e-3 * torch.randn(moment_shape(case.shape, rule), generator=generator)
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.exp_avgs.append(past.to(precision.state))
        bucket.exp_avg_sqs.append((2 * past**2).to(precision.state))
        # some limit the update, some do not
        bucket.norms.append(torch.rand(norm_shape(case.shape, rule), generator=generator) * 10 ** (i % 4 - 1))
        bucket.epochs.append(torch.tensor(2.0))
        bucket.steps.append(torch.tensor(float(3 * i)))
    return bucket


def assert_same_buckets(actual, expected):
    """Every tensor of two buckets, or of two results of ``copies``, has the same bits."""
    actual, expected = (x.columns() if isinstance(x, Bucket) else x for x in (actual, expected))
    for name, column, other in zip(NAMES, actual, expected, strict=True):
        for i, (a, b) in enumerate(zip(column, other, strict=True)):
            assert_same_bits(a, b, f"{name}[{i}]")
