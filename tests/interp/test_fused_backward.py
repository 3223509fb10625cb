"""Kernels in the backward pass, in Triton's interpreter: the bits of kernels after it, for every optimizer."""

import pytest
import torch

from lowmem_optim import fuse_backward
from optim.every import every_case
from optim.fused import Net, adalomo, assert_same_runs, run


@every_case
def test_fused_equals_unfused(case):
    """Launches have other lists of parameters. A norm that couples them does not clip here: its last bit may differ."""
    options = {"backend": "triton", **({"clip_grad_norm": 1e6} if case.couples_parameters else {})}
    runs = [run(case, fused, torch.bfloat16, steps=2, options=options) for fused in (True, False)]
    assert_same_runs(*runs)


def test_autograd_knows_that_kernels_have_written():
    model = Net()
    fuse_backward(model, adalomo(model, backend="triton"))
    loss = model.loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
