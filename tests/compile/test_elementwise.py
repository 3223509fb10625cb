"""Elementwise kernels compile for every target, without spills, with 16-byte accesses and 64-bit addresses."""

import re

from compiling import chosen, compiled, inspected, over
from lowmem_kernels.testing.aot import CompileCase, narrow_offsets

#: Targets other than the H100's compile each dtype, state and rounding at least once, each verb and layout together,
#: and all options at once.
FEW = (
    "adamw-bf16-state_fp32-aligned-stochastic",
    "adamw-bf16-state_bf16-aligned-stochastic",
    "adamw-fp16-state_fp32-aligned-nearest",
    "adamw-bf16-state_fp32-misaligned-stochastic",
    "adamw-fp32-state_fp32-strided-nearest",
    "adamw-bf16-state_fp32-range_of_whole",
    "adamw-bf16-state_fp32-pieces_of_whole",
    "scaled_update-fp32-aligned-nearest",
    "scaled_update-bf16-misaligned-stochastic",
    "scaled_update-bf16-strided-stochastic",
    "scaled_update-bf16-all_options",
    "grad_stats-bf16-aligned",
    "grad_stats-bf16-misaligned",
    "grad_stats-bf16-strided",
)
CASES = chosen(
    lambda target, name: (
        name.startswith(("adamw", "scaled_update", "grad_stats")) and (target == "sm_90" or name in FEW)
    )
)
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}

every_case = over(CASES)


def tensor_bits(case: CompileCase) -> tuple[list[int], list[int]]:
    """Element widths of the tensors that the kernel reads and writes, by the kernel's contract."""
    _, dtype, *rest = case.name.split("-")
    bits = BITS[dtype]
    if case.name.startswith("grad_stats"):
        return [bits], []
    states = [BITS[part.removeprefix("state_")] for part in rest if part.startswith("state_")] * 2
    return [bits, bits, *states], [bits, *states]


@every_case
def test_fits_in_registers(target, name):
    report = inspected(target, name)
    constexprs = CASES[target, name].constexprs
    if target == "sm_80" or constexprs["STRIDED"] or constexprs.get("DIGITS"):
        # the tiles were chosen for sm_90, and NVIDIA's 64-bit division, which strided layouts and shards in
        # pieces need, is a call with a frame of its own: a register or two may be saved. Triton 3.6.0 does so for the
        # start of a range as well, on sm_100
        assert report.stack_bytes <= 16, report
    else:
        assert not report.spilled, report
    # four blocks of four warps, each with 16 bytes of every tensor in flight for each thread, cover memory's latency
    assert report.occupancy >= 0.25, report


@every_case
def test_bulk_accesses_are_16_bytes(target, name):
    case = CASES[target, name]
    report = inspected(target, name)
    reads, writes = tensor_bits(case)
    if not case.constexprs["ALIGNED"]:
        # nothing is promised, so nothing may be assumed: a vector access here would fault on a GPU
        assert report.loads[128] == report.stores[128] == 0, report
        return
    # there, two neighbours in the table are read at once, twice
    of_table = 2 if target == "gfx942" and case.constexprs.get("DIGITS") else 0
    if case.constexprs.get("DIGITS") == 2:
        # four, and as wide as that: 8 bytes of 16-bit numbers
        assert report.loads[128] == reads.count(32) + of_table, report
        assert report.stores[128] == writes.count(32), report
        assert report.stores[64] == writes.count(16), report
        return
    # eight elements for each thread of every tensor, in the loop over whole vectors
    assert report.loads[128] == sum(8 * bits // 128 for bits in reads) + of_table, report
    assert report.stores[128] == sum(8 * bits // 128 for bits in writes), report
    # 16-bit accesses are left for the tail of fewer than eight elements; grad_stats reads it with a whole block
    in_tail = 8 if case.name.startswith("grad_stats") else 1
    assert report.loads[16] == in_tail * reads.count(16), report
    assert report.stores[16] == writes.count(16), report


@every_case
def test_addresses_are_64_bits(target, name):
    """Tensors beyond 2**31 elements: the base of a block is moved by 64-bit numbers, and only lanes have 32 bits."""
    case = CASES[target, name]
    kernel = compiled(target, name)
    lanes = {f"tensor<{lanes}xi32>" for lanes in (case.constexprs["BLOCK"], 8)}
    for offset in narrow_offsets(kernel):
        if offset.pointer == "pointer":  # a tensor's address, read from the table
            assert offset.offset_type in lanes, offset
        else:
            assert offset.pointer in {"table_ptr", "counter_ptr", "partial_ptr", "out_ptr"}, offset
    ttir = kernel.asm["ttir"]
    assert re.search(rf"arith\.muli .*, %c{case.constexprs['TILE']}_i64", ttir), "the start of a tile is not 64 bits"
    # 32-bit products are those of the hash (two odd multipliers), of a tensor's number of dimensions (times 3) and of a
    # shard's (times 2): none can overflow into an address
    factors = set(re.findall(r"arith\.muli [^,]*, %c(-?\d+)_i32", ttir))
    assert factors <= {"2146121005", "-2073254261", "3", "2"}, factors


@over([("sm_90", "scaled_update-bf16-all_options")])
def test_a_nan_survives_clipping_by_value(target, name):
    """The interpreter's minimum and maximum always pass NaN on; a GPU's do only if they are asked to."""
    ptx = compiled(target, name).asm["ptx"]
    assert re.search(r"min\.NaN\.f32", ptx), "clipping from above"
    assert re.search(r"max\.NaN\.f32", ptx), "clipping from below"
    assert not re.search(r"(min|max)\.f32", ptx), "a clip that drops NaN"
