"""Whitening kernels compile for every target: tensor cores, 16-byte accesses, no spills on sm_90, 64-bit addresses."""

import re

from compiling import chosen, compiled, inspected, over
from lowmem_kernels.testing.aot import narrow_offsets

KERNELS = ("row_stats", "gram", "whiten_apply", "whitened")
#: What is compiled for other targets than sm_90, of which every case is.
FEW = ("row_stats-bf16-aligned", "row_stats-bf16-strided", *(
    f"{kind}-bf16-{rest}" for kind in ("gram", "whiten_apply")
    for rest in ("aligned-left-128-exact", "aligned-right-128-exact", "aligned-right-128-fast", "strided-left-64-exact")
))  # fmt: skip
CASES = chosen(
    lambda target, name: (
        name == "advance-fp32-aligned" or (name.startswith(KERNELS) and (target == "sm_90" or name in FEW))
    )
)
BITS = {"bf16": 16, "fp32": 32}

every_case = over(CASES)


@every_case
def test_fits_in_registers(target, name):
    """Nothing spills on sm_90 and gfx942. On the others at most 16 numbers of a thread do, outside of the loop over a
    product's depth; without the bound on that depth it was 3.5 KB on sm_80."""
    report = inspected(target, name)
    if target in ("sm_90", "gfx942"):
        assert not report.spilled, report
    else:
        assert report.stack_bytes <= 64, report
    assert report.programs >= 1, report


@every_case
def test_bulk_accesses_are_16_bytes(target, name):
    kind, dtype, layout, *rest = name.split("-")
    report = inspected(target, name)
    if kind == "advance":
        return
    if layout != "aligned":
        # nothing is promised, so nothing may be assumed: a vector access of p or g would fault on a GPU. What is wider
        # than an element are the table's numbers, in scratch memory
        assert report.loads[128] == report.stores[128] == 0, report
        return
    bits = BITS[dtype]
    if kind == "row_stats":
        # 16 elements of a thread in each sweep, and the first of each of its rows
        sweeps = 1 if "not_centred" in rest else 2
        if target != "gfx942":
            assert report.loads[128] == sweeps * 16 * bits // 128, report
        assert report.loads[16] <= 4, report
        return
    # a thread has 16 or 32 bytes of each operand that is bfloat16 or fp32; narrow ones would be eight times as many
    assert report.loads[128] >= 4, report
    assert report.loads[16] == report.stores[16] == 0, report
    assert sum(report.stores.values()) == report.stores[128] + report.stores[64], report
    if target != "gfx942":
        assert report.stores[64] == 0, report


@every_case
def test_products_go_to_tensor_cores(target, name):
    """Three TF32 products for one of fp32, or one; AMD has instructions for fp32."""
    kind, *_, speed = name.split("-")
    if kind in ("row_stats", "advance"):
        return
    asm = compiled(target, name).asm
    if target == "gfx942":
        assert "v_mfma_f32" in asm["amdgcn"]
        assert not re.search(r"v_mfma_f32_\w+_(bf16|f16|xf32)", asm["amdgcn"])
        return
    pattern = {
        "sm_80": r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32",
        "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32",
        "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::tf32",
    }[target]
    assert re.search(pattern, asm["ptx"])
    assert "x3" in CASES[target, name].constexprs["PRECISION"] or speed == "fast"
    # no product is left to the units of fp32: a depth of 16 would be some thousand of them
    assert len(re.findall(r"fma\.rn\.f32", asm["ptx"])) < 100


@every_case
def test_addresses_are_64_bits(target, name):
    """Rows are widened before they meet a stride. What has 32 bits is a column, added to a base that 64 bits moved."""
    kernel = compiled(target, name)
    small = {"table_ptr", "addresses_ptr", "bad_ptr", "row_ptr", "stats_ptr", "columns_ptr", "inverse_ptr"}
    for offset in narrow_offsets(kernel):
        assert offset.pointer in small or re.match(r"tensor<\d+x\d+xi32>$", offset.offset_type), offset
    # so no product of tensors has 32 bits, but for those by the noise's constants
    constants = dict(re.findall(r"(%\S+) = arith.constant dense<(-?\d+)> : tensor<\S+xi32>", kernel.asm["ttir"]))
    for factor in re.findall(r"arith\.muli \S+, (\S+) : tensor<\S+xi32>", kernel.asm["ttir"]):
        assert constants.get(factor) in {"2146121005", "-2073254261", "16"}, factor


def test_nothing_is_contracted():
    """Bits of an update do not depend on which products and sums a compiler fuses."""
    for case in CASES.values():
        assert case.options["enable_fp_fusion"] is False
