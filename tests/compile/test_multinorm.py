"""The multi-normalization kernel compiles for every target: registers, 16-byte accesses, 64-bit addresses."""

import pytest

from compiling import IS_OLDEST, chosen, compiled, inspected, over
from lowmem_kernels.multinorm.fields import SLAB
from lowmem_kernels.testing.aot import TARGETS, compile_case, inspect_kernel, narrow_offsets
from lowmem_kernels.testing.multinorm_specializations import sums_case

#: A case takes five seconds to compile: those that differ least from others are left to `make report`, and targets
#: other than the H100's compile what differs most.
LEFT_OUT = ("rows_of_64", "row_of_11008_only", "momentum_after", "fp16-rows_of_4096")
FEW = ("multinorm-bf16-rows_of_4096", "multinorm-bf16-strided")
CASES = chosen(
    lambda target, name: (
        name.startswith("multinorm") and (not name.endswith(LEFT_OUT) if target == "sm_90" else name in FEW)
    )
)
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
#: A few numbers that do not fit into 128 registers: 16384 columns to a program; noise of elements that are not counted
#: as they lie; a momentum beside the scales.
FEW_SPILLS = ("rows_of_11008", "transposed", "table", "whole")

every_case = over(CASES)


@every_case
def test_fits_in_registers(target, name):
    report = inspected(target, name)
    if CASES[target, name].constexprs["STRIDED"]:
        # NVIDIA's 64-bit division, which strided layouts need, has a stack frame
        assert report.stack_bytes <= 64, report
    elif target == "sm_80" or name.endswith(FEW_SPILLS):
        assert report.stack_bytes <= (72 if IS_OLDEST else 48), report
    else:
        assert not report.spilled, report
    # two programs of eight warps, or one of sixteen
    assert report.occupancy >= (0.125 if target == "gfx942" else 0.25), report


@every_case
def test_tiles_are_accessed_in_16_bytes(target, name):
    case = CASES[target, name]
    report, flags = inspected(target, name), case.constexprs
    if not flags["ALIGNED"]:
        # nothing is promised, so no tile may be taken in vectors: a vector access there would fault on a GPU
        assert report.stores[128] == 0, report
        # AMD's compiler merges loads of neighbouring fields of the table
        assert report.loads[128] == 0 or target == "gfx942", report
        return
    lanes = case.options["num_warps"] * TARGETS[target].warp_size
    sweep = flags["BLOCK_LINES"] * flags["BLOCK_PLACES"] // lanes
    apply = flags["APPLY_LINES"] * flags["APPLY_PLACES"] // lanes
    bits, momentum = BITS[name.split("-")[1]], 32 * (flags["MOMENTUM"] != "none")
    # g and m: once in a read, twice where lines are too long to be held; and in the last read, which reads p too
    held = 1 if flags["RESIDENT"] else 2
    read = flags["SWEEPS"] * held * sweep * (bits + momentum * (flags["MOMENTUM"] == "before"))
    if flags["WRITE"]:
        read += apply * (2 * bits + momentum)
    written = apply * (bits + momentum) if flags["WRITE"] else 0
    # a momentum of a matrix that is transposed in memory is not, and is not taken in vectors
    assert report.loads[128] >= read // 128, report
    assert report.stores[128] >= written // 128, report
    # and no tile element by element
    assert report.narrow_loads(32) == report.narrow_stores(32) == 0, report


@pytest.mark.parametrize("target", TARGETS)
def test_sums_of_pieces_fit_in_registers(target):
    report = inspect_kernel(compile_case(sums_case(), target), target)
    assert not report.spilled, report
    assert report.occupancy >= 0.25, report


@every_case
def test_addresses_are_64_bits(target, name):
    """Tensors beyond 2**31 elements: what a line or a matrix adds to an address has 64 bits, only lanes have 32."""
    flags = CASES[target, name].constexprs
    axes = ("BLOCK_LINES", "BLOCK_PLACES", "APPLY_LINES", "APPLY_PLACES")
    lanes = {f"tensor<{flags[axis]}xi32>" for axis in axes} | {f"tensor<{SLAB}xi32>"}
    for offset in narrow_offsets(compiled(target, name)):
        if offset.pointer == "pointer":  # a tensor's address, read from the table
            assert offset.offset_type in lanes, offset
        else:
            assert offset.pointer in {"table_ptr", "addresses_ptr", "counters_ptr", "scratch_ptr", "sums_ptr"}, offset
