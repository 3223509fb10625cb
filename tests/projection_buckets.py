"""Buckets of tensors for the projection verbs. The same arguments make equal buckets."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from buckets import FP32, SEED, Lists, assert_same_lists
from lowmem_kernels import Rounding
from lowmem_kernels.projection import ApolloRule, Draw, apollo_update_
from lowmem_kernels.projection.rule import moment_shape, norm_shape
from lowmem_kernels.testing import Case, Precision, make_tensors

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
class Bucket(Lists):
    names = NAMES
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    norms: list[Tensor]
    epochs: list[Tensor]
    steps: list[Tensor]
    cases: list[Case]
    precision: Precision

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


assert_same_buckets = partial(assert_same_lists, NAMES)
