"""The kernel of examples/custom_verb compiles for every target, without spills and with 16-byte accesses."""

import pytest
import triton.language as tl
from lion_kernels.kernels import _lion_kernel

from lowmem_kernels.elementwise.launch import plan_elementwise
from lowmem_kernels.table import Layout
from lowmem_kernels.testing.aot import TARGETS, CompileCase, compile_case, inspect_kernel, narrow_offsets

POINTERS = {
    "table_ptr": "*i64",
    "counter_ptr": "*i32",
    "skipped_ptr": "*i64",
    "found_inf": "*fp32",
    "inv_scale": "*fp32",
    "clip_coef": "*fp32",
}
NUMBERS = ("lr", "weight_decay", "beta1", "one_minus_beta1", "one_minus_beta2", "scale")


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16(target):
    plan = plan_elementwise(16384, Layout(True, False), TARGETS[target].warp_size)
    case = CompileCase(
        name="lion-bf16-state_bf16-aligned-stochastic",
        kernel=_lion_kernel,
        signature={**POINTERS, "rows": "i32", **dict.fromkeys(NUMBERS, "fp32")},
        constexprs={
            "clip_value": None, "PARAM": tl.bfloat16, "GRAD": tl.bfloat16, "STATE": tl.bfloat16, "ALIGNED": True,
            "STRIDED": False, "DIGITS": 0, "STOCHASTIC": True, "SKIP_NONFINITE": True, "TILE": plan.tile,
            "BLOCK": plan.block,
        },
        divisible_by_16=tuple(POINTERS),
        options={"enable_fp_fusion": False, "num_warps": plan.num_warps},
    )  # fmt: skip
    kernel = compile_case(case, target)
    report = inspect_kernel(kernel, target)
    assert not report.spilled, report
    # as for the package's own element-wise kernels: enough programs to cover memory's latency
    assert report.occupancy >= 0.25, report
    # eight elements for each thread of every tensor: p, g and m are read, p and m written
    assert report.loads[128] == 3, report
    assert report.stores[128] == 2, report
    # tensors may exceed 2^31 elements: 64 bits move the start of a block, only its lanes have 32
    offsets = {offset.offset_type for offset in narrow_offsets(kernel) if offset.pointer == "pointer"}
    assert offsets == {f"tensor<{plan.block}xi32>", "tensor<8xi32>"}
