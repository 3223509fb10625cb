"""The projection kernels compile for every target: tensor cores, registers, 16-byte accesses, 64-bit addresses."""

import re

import pytest

from compiling import IS_OLDEST, chosen, compiled, inspected, over
from lowmem_kernels.testing import loops
from lowmem_kernels.testing.aot import TARGETS, compile_case, disassembled, inspect_kernel, narrow_offsets
from lowmem_kernels.testing.projection_specializations import finish_case

#: A case takes some seconds to compile: targets other than the H100's compile what differs most.
FEW = ("apollo-bf16-rank_256", "apollo-bf16-rank_1", "apollo-bf16-rank_1_of_columns-pieces")
CASES = chosen(
    lambda target, name: (
        name.startswith(("apollo", "channel_apply", "projection")) and (target == "sm_90" or name in FEW)
    )
)
APOLLO = {key: case for key, case in CASES.items() if key[1].startswith("apollo")}
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
#: What multiplies matrices of bfloat16, by target.
TENSOR_CORES = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "sm_100": r"tcgen05\.mma\S*kind::f16",
    "gfx942": r"v_mfma_f32_\S+bf16",
}

every_case = over(CASES)


@over(key for key, case in APOLLO.items() if case.constexprs["MODE"] == "dot" and "bf16" in case.name)
def test_products_are_tensor_cores(target, name):
    code = compiled(target, name).asm["amdgcn" if target == "gfx942" else "ptx"]
    expected = TENSOR_CORES[target]
    if target == "sm_90" and not CASES[target, name].constexprs["ALIGNED"]:
        expected = TENSOR_CORES["sm_80"]  # tiles of 32 channels are too small for a warp group
    assert re.search(expected, code)


@over(key for key in APOLLO if "fp32-rank_64" in key[1])
def test_products_of_fp32_are_three_of_tf32(target, name):
    assert re.search(r"wgmma\S+\.f32\.tf32\.tf32", compiled(target, name).asm["ptx"])


@every_case
def test_fits_in_registers(target, name):
    report, flags = inspected(target, name), CASES[target, name].constexprs
    if flags.get("STRIDED"):
        # NVIDIA's 64-bit division, which strided layouts need, has a stack frame
        assert report.stack_bytes <= 192, report
    elif flags.get("RANKS_AT_A_TIME") == 256:
        # 128 of the registers are sums; what is put aside is used once in a tile of 128 channels
        assert report.stack_bytes <= 512, report
    else:
        # of pieces two numbers of what does not fit into 128 registers, outside of all loops
        assert report.stack_bytes <= (8 if IS_OLDEST or "pieces" in name else 0), report
    assert report.programs >= (1 if flags.get("MODE") == "dot" or "misaligned" in name else 2), report


@over(key for key in APOLLO if "rank_256" in key[1] and key[0] == "sm_90")
def test_nothing_is_put_aside_where_it_is_multiplied(target, name):
    code, labels = loops._parse(disassembled(compiled(target, name).asm["cubin"]), False)
    products = {i for i, instruction in enumerate(code) if instruction.opcode.startswith("HGMMA")}
    inner = min((loop for loop in loops._loops(code, labels) if loop & products), key=len)
    assert not [code[i] for i in inner if code[i].opcode.startswith(("LDL", "STL"))]


@over(APOLLO)
def test_tiles_are_accessed_in_16_bytes(target, name):
    case = CASES[target, name]
    report, flags = inspected(target, name), case.constexprs
    lanes = case.options["num_warps"] * TARGETS[target].warp_size
    if not flags["ALIGNED"]:
        # nothing is promised of g and p: a vector access there would fault on a GPU
        assert report.narrow_loads(32) >= flags["APPLY_LINES"] * flags["APPLY_PLACES"] // lanes, report
        return
    apply = flags["APPLY_LINES"] * flags["APPLY_PLACES"] // lanes
    moments = flags["MOMENT_LINES"] * flags["MOMENT_RANKS"] // lanes
    bits = BITS[name.split("-")[1]]
    # p and g in the last read, both moments and R; the first read of g may be an asynchronous copy
    assert report.loads[128] >= (apply * 2 * bits + moments * 3 * 32) // 128, report
    assert report.stores[128] >= (apply * bits + moments * 2 * 32) // 128, report
    assert report.narrow_loads(32) == report.narrow_stores(32) == 0, report


@pytest.mark.parametrize("target", TARGETS)
def test_what_follows_the_moments_of_pieces_fits_in_registers(target):
    report = inspect_kernel(compile_case(finish_case(), target), target)
    assert not report.spilled, report
    assert report.occupancy >= 0.25, report


@over(APOLLO)
def test_addresses_are_64_bits(target, name):
    """Tensors beyond 2**31 elements: what a channel or a matrix adds to an address has 64 bits, only lanes have 32."""
    flags = CASES[target, name].constexprs
    axes = ("BLOCK_LINES", "BLOCK_PLACES", "APPLY_LINES", "APPLY_PLACES", "MOMENT_LINES", "MOMENT_RANKS")
    lanes = {f"tensor<{flags[axis]}xi32>" for axis in axes}
    # a projection, and the norms of a stack's matrices
    lanes |= {f"tensor<{flags['BLOCK_PLACES']}x{flags['RANKS_AT_A_TIME']}xi32>", "tensor<8xi32>"}
    for offset in narrow_offsets(compiled(target, name)):
        if offset.pointer == "pointer":  # a tensor's address, read from the table
            assert offset.offset_type in lanes, offset
        else:
            assert offset.pointer in {"table_ptr", "addresses_ptr", "counters_ptr", "scratch_ptr", "sums_ptr"}, offset
