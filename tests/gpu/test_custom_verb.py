"""The kernel of examples/custom_verb on a real GPU has the bits of its reference on the same device."""

import pytest
import torch
from lion_kernels import lion_

from buckets import assert_same_buckets, make_bucket, moved
from lowmem_kernels.testing import PRECISIONS, SHAPES

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_has_the_bits_of_the_reference(precision):
    """Products, sums and comparisons of fp32, which a GPU rounds as torch does."""
    buckets = []
    for backend in ("torch", "triton"):
        bucket = make_bucket(SHAPES, precision)
        for name in bucket.names:
            setattr(bucket, name, [moved(t, DEVICE) for t in getattr(bucket, name)])
        for _ in range(3):
            lion_(
                bucket.params, bucket.grads, bucket.exp_avgs, bucket.steps, lr=torch.tensor(2e-2, device=DEVICE),
                betas=(0.8, 0.95), weight_decay=0.1, rounding=bucket.rounding(), backend=backend,
            )  # fmt: skip
        buckets.append(bucket)
    assert_same_buckets(*buckets)
