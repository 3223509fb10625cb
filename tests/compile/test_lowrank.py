"""Kernels of partial momentum compile for every target: no spills, tensor cores, 16-byte accesses, wide addresses."""

import re

from compiling import IS_OLDEST, chosen, compiled, inspected, over
from lowmem_kernels.testing.aot import narrow_offsets
from lowmem_kernels.testing.lowrank_specializations import lowrank_cases, problem_cases

GRADIENTS = {case.name for case in lowrank_cases(32)}
PROBLEMS = {case.name for case in problem_cases(32)}
#: What is compiled for other targets than sm_90, of which every case is.
FEW = ("col_pass-bf16-aligned-16", "momentum_update-bf16-aligned-16", "left_problem-16")
CASES = chosen(lambda target, name: name in GRADIENTS | PROBLEMS and (target == "sm_90" or name in FEW))

every_case = over(CASES)
gradient_cases = over(key for key in CASES if key[1] in GRADIENTS)


@every_case
def test_fits_in_registers(target, name):
    """Nothing spills, in loops that have as many operands as a tile of p, g, v, and four of factors."""
    report = inspected(target, name)
    assert report.stack_bytes <= (8 if IS_OLDEST else 0), report
    assert report.programs >= 1, report


@gradient_cases
def test_bulk_accesses_are_16_bytes(target, name):
    """Or all that a thread has of a tile: with factors 8 elements, of 64 lanes 4. Columns of factors are few."""
    report = inspected(target, name)
    if "strided" in name:
        # nothing is promised, so nothing may be assumed: a vector access of p or g would fault on a GPU
        assert report.loads[128] == report.stores[128] == 0, report
        return
    assert report.loads[16] == report.stores[16] == 0, report
    if target != "gfx942":
        assert report.loads[128] >= 2, report
        if name.startswith("momentum_update"):
            assert report.stores[128] >= 3, report


@over(key for key in CASES if not key[1].startswith("group_moments") and not {"none", "full"} & {*key[1].split("-")})
def test_products_go_to_tensor_cores(target, name):
    """Three TF32 products for one of fp32; AMD has instructions for fp32."""
    asm = compiled(target, name).asm
    if target == "gfx942":
        assert "v_mfma_f32" in asm["amdgcn"]
        return
    assert re.search(r"mma\S*\.tf32|kind::tf32", asm["ptx"])
    assert len(re.findall(r"fma\.rn\.f32", asm["ptx"])) < 100


@gradient_cases
def test_addresses_are_64_bits(target, name):
    """Rows are widened before they meet a stride. What has 32 bits is a column, added to a base that 64 bits moved."""
    small = {
        "table_ptr", "addresses_ptr", "row_ptr", "small_ptr", "row_offsets_ptr", "col_offsets_ptr", "row_sums_ptr",
        "col_sums_ptr", "partial_ptr", "clip_ptr", "counter_ptr", "bad_ptr", "mean_ptr", "base", "pointer",
    }  # fmt: skip
    for offset in narrow_offsets(compiled(target, name)):
        assert offset.pointer in small or re.match(r"tensor<\d+(x\d+)?xi32>$", offset.offset_type), offset


def test_nothing_is_contracted():
    """Bits of an update do not depend on which products and sums a compiler fuses."""
    for case in CASES.values():
        assert case.options["enable_fp_fusion"] is False
