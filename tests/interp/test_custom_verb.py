"""The kernel of examples/custom_verb in Triton's interpreter has the bits of its reference.

Both do the same fp32 products and sums in the same order, so there is no tolerance.
"""

import pytest
import torch
from lion_kernels import lion_

from buckets import assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform
from lowmem_kernels.shards import Shard
from lowmem_kernels.testing import PRECISIONS, SHAPES, Precision

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
EVERYTHING = {"inv_scale": torch.tensor(0.3), "clip_value": 0.1, "clip_coef": torch.tensor(0.7), "maximize": True}


def both(cases, precision, steps=1, spoil=False, shards=None, **transform):
    """The same steps by the reference and by the kernel."""
    buckets, counts = [], []
    for backend in ("torch", "triton"):
        bucket, skipped = make_bucket(cases, precision), torch.tensor(0)
        if spoil:
            for grad in bucket.grads:
                grad.view(-1)[-1:] = torch.nan
        for _ in range(steps):
            lion_(
                bucket.params, bucket.grads, bucket.exp_avgs, bucket.steps, lr=2e-2, betas=(0.8, 0.95),
                weight_decay=0.1, transform=GradTransform(skipped=skipped, **transform), rounding=bucket.rounding(),
                shards=shards, backend=backend,
            )  # fmt: skip
        buckets.append(bucket)
        counts.append(skipped.item())
    assert counts[0] == counts[1] == (steps * len(cases) if spoil else 0)
    assert_same_buckets(*buckets)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_all_layouts_in_one_call(precision):
    both(SHAPES, precision, steps=2)


def test_transforms():
    both(SHAPES[:4], BF16_SR, **EVERYTHING)


def test_kept_elements():
    """The last one of each tensor, which is in the tail of fewer than 8 where the size is odd."""
    whole = [case for case in SHAPES if case.name in ("scalar", "odd_matrix", "not_16", "tile_plus_1")]
    both(whole, BF16_SR, spoil=True)


def test_found_inf():
    both(SHAPES[:4], BF16_SR, found_inf=torch.tensor(1.0))


def test_shards():
    """A range of a whole, and columns of one."""
    cases = [case for case in SHAPES if case.name in ("odd_matrix", "tile_plus_1")]
    rows = cases[0].shape
    both(cases, BF16_SR, shards=[Shard(5, ((rows[0], 3 * rows[1]), (rows[1], 1))), Shard(1001, ((4096, 1),))])
