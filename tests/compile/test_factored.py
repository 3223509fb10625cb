"""The factored kernels compile for every target, without spills, with 16-byte accesses and 64-bit addresses."""

import re

from compiling import chosen, compiled, inspected, over
from lowmem_kernels.factored.fields import SLAB
from lowmem_kernels.testing.aot import TARGETS, CompileCase, narrow_offsets

#: A case takes five seconds to compile, so targets other than the H100's compile what differs most.
FEW = ("adafactor-bf16-aligned-stochastic", "adafactor-bf16-strided-stochastic", "came-fp32-state_fp32-aligned")
CASES = chosen(lambda target, name: name.startswith(("adafactor", "came")) and (target == "sm_90" or name in FEW))
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}

every_case = over(CASES)


def tiles_accessed(case: CompileCase) -> tuple[list[int], list[int]]:
    """Element widths of the tiles that the kernel's phases read and write, each once in the code."""
    rule, dtype, *rest = case.name.split("-")
    bits = BITS[dtype]
    # V of parameters that are not factored: at the first look, and where it is written
    if rule == "came":
        m = BITS[rest[0].removeprefix("state_")]
        # g: look (full; two sweeps), residual; m: residual, apply; p: apply
        return [bits] * 4 + [32, 32] + [m, m] + [bits], [32, m, bits]
    floor = [bits] if case.constexprs["EPS_FLOOR"] else []
    momentum = [32] if case.constexprs["MOMENTUM"] else []
    # p: sum of squares; g: look (full; two sweeps), apply; p: apply
    return [bits] + [bits] * 4 + floor + [32, 32] + momentum + [bits], [32, *momentum, bits]


@every_case
def test_fits_in_registers(target, name):
    report = inspected(target, name)
    if CASES[target, name].constexprs["STRIDED"]:
        # NVIDIA's 64-bit division, which strided layouts need for stacks of matrices, has a stack frame
        assert report.stack_bytes <= 64, report
    elif target == "sm_80" or name.startswith("came") or CASES[target, name].constexprs["MOMENTUM"]:
        # a few numbers that do not fit into 128 registers, depending on target and Triton's version
        assert report.stack_bytes <= 48, report
    else:
        assert not report.spilled, report
    # two programs of eight warps, or one of sixteen, have 32 KB in flight
    assert report.occupancy >= (0.125 if target == "gfx942" else 0.25), report


@every_case
def test_bulk_accesses_are_16_bytes(target, name):
    case = CASES[target, name]
    report = inspected(target, name)
    if not case.constexprs["ALIGNED"]:
        # nothing is promised, so no tile may be taken in vectors: a vector access there would fault on a GPU
        assert report.stores[128] == 0, report
        # AMD's compiler merges loads of neighbouring fields of the table
        assert report.loads[128] == 0 or target == "gfx942", report
        return
    warp_size = TARGETS[target].warp_size
    elements = case.constexprs["BLOCK_ROWS"] * case.constexprs["BLOCK_COLS"] // (case.options["num_warps"] * warp_size)
    reads, writes = tiles_accessed(case)
    # column sums and factors may be read in wide accesses too
    assert report.loads[128] >= sum(elements * bits // 128 for bits in reads), report
    assert report.stores[128] >= sum(elements * bits // 128 for bits in writes), report
    # and no tile element by element
    assert report.narrow_loads(32) == report.narrow_stores(32) == 0, report


@every_case
def test_addresses_are_64_bits(target, name):
    """Tensors beyond 2**31 elements: what a row or a matrix adds to an address has 64 bits, only lanes have 32."""
    case = CASES[target, name]
    lanes = {f"tensor<{case.constexprs[axis]}xi32>" for axis in ("BLOCK_ROWS", "BLOCK_COLS")} | {f"tensor<{SLAB}xi32>"}
    for offset in narrow_offsets(compiled(target, name)):
        if offset.pointer == "pointer":  # a tensor's address, read from the table
            assert offset.offset_type in lanes, offset
        else:
            assert offset.pointer in {"table_ptr", "addresses_ptr", "counters_ptr", "scratch_ptr", "sums_ptr"}, offset


@over([("sm_90", "adafactor-bf16-aligned-stochastic")])
def test_carried_and_recomputed_sums_have_one_order(target, name):
    """RMS(p) of a resumed run has the bits of an uninterrupted one: both sums of p² reduce one layout.

    The interpreter has no layouts; on a GPU the order in which threads add up a tile is that of its layout.
    """
    case = CASES[target, name]
    rows, quads = case.constexprs["BLOCK_ROWS"], case.constexprs["BLOCK_COLS"] // 4
    ttgir = compiled(target, name).asm["ttgir"]
    fours = re.findall(rf"\(tensor<{rows}x{quads}x4xf32, (#\w+)>\) -> tensor<{rows}x{quads}xf32", ttgir)
    whole = re.findall(rf"\(tensor<{rows * quads}xf32, (#\w+)>\) -> f32", ttgir)
    # before the update and after it; and sums over g, by rows and for vectors
    assert len(fours) == 4, fours
    assert len(whole) == 3, whole
    assert len(set(fours)) == len(set(whole)) == 1, (fours, whole)
