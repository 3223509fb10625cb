"""The calls of `lowmem_kernels.testing.verbs`, which reports and profiles make, request what they say they do."""

import pytest
import torch

from lowmem_kernels.testing.bytecount import count_bytes
from lowmem_kernels.testing.verbs import VERBS, make_call

#: Aligned matrices, a stack of them, and a vector.
SHAPES = [(24, 512), (2, 16, 64), (1024,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("verb", VERBS)
def test_requested_bytes_are_the_formula(verb, dtype):
    call = make_call(verb, SHAPES, dtype, backend="triton")
    tensors = {name: [t for t in group if t is not None] for name, group in call.tensors.items()}
    before = [param.clone() for param in tensors.get("params", [])]
    with count_bytes(tensors) as traffic:
        call.run()
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs"]
    vector = tensors["rows"][2] if "rows" in tensors else None
    if vector is not None:
        # V of the vector is as long as it is; the rows of matrices are not in the formula
        names.append("rows")
    read, written = (sum(kind[name] for name in names) for kind in (traffic.read, traffic.written))
    matrices = sum(4 * rows.numel() for rows in tensors["rows"][:2]) if vector is not None else 0
    assert (read - matrices, written - matrices) == call.formula
    # the call has done what it is for
    assert all(not torch.equal(a, b) for a, b in zip(before, tensors.get("params", []), strict=True))
    if "steps" in tensors:
        assert [float(step) for step in tensors["steps"]] == [4.0] * 3


def test_a_sweep_over_matrices_comes_from_a_cache():
    call = make_call("came", SHAPES, torch.bfloat16)
    assert sum(call.formula) - call.least == 2 * (24 * 512 + 2 * 16 * 64)
    call = make_call("adamw", SHAPES, torch.bfloat16)
    assert sum(call.formula) == call.least


def test_unknown_verbs_are_refused():
    with pytest.raises(ValueError, match="verb is 'adam'; allowed: 'adamw', "):
        make_call("adam", SHAPES, torch.float32)
