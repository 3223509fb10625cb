"""Loops over tiles are found in machine code, with their instructions and the widths of their accesses."""

import pytest
import triton
import triton.language as tl

from lowmem_kernels.testing.aot import TARGETS, CompileCase, compile_case
from lowmem_kernels.testing.loops import tile_loops


@triton.jit
def _search(table_ptr, n):
    low = 0
    while n - low > 1:
        middle = (low + n) // 2
        if tl.load(table_ptr + middle) <= 3:
            low = middle
        else:
            n = middle
    return low


@triton.jit
def _sum(x_ptr, n):
    total = 0.0
    for block in range(n):  # as wide as a tile by chance
        total += tl.sum(tl.load(x_ptr + block * 1024 + tl.arange(0, 1024)))
    return total


@triton.jit
def _scale_kernel(table_ptr, x_ptr, y_ptr, n, blocks, cold, BLOCK: tl.constexpr, SMALL: tl.constexpr):
    total = _sum(x_ptr, cold)
    for small in range(0, n, SMALL):  # no loop over tiles: its accesses are smaller
        total += tl.sum(tl.load(x_ptr + small + tl.arange(0, SMALL)))
    for block in range(_search(table_ptr, n), blocks):
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs)
        if block == cold:
            x = tl.exp(tl.cos(x) / total)
        tl.store(y_ptr + offs, x)
    for block in range(blocks):
        tl.store(y_ptr + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


def case(block: int = 1024) -> CompileCase:
    return CompileCase(
        name="scale",
        kernel=_scale_kernel,
        signature={
            "table_ptr": "*i32", "x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "blocks": "i32", "cold": "i32",
        },
        constexprs={"BLOCK": block, "SMALL": 64},
        divisible_by_16=("table_ptr", "x_ptr", "y_ptr"),
        options={"num_warps": 4},
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_loops_over_tiles_and_no_others(target):
    loops = tile_loops(case(), compile_case(case(), target), target)
    by_name = {loop.name: loop for loop in loops}
    # neither the loop over small pieces, the first in this function, nor that of another one is listed
    assert sorted(by_name) == ["_scale_kernel 2", "_scale_kernel 3"], loops
    copy, fill = by_name["_scale_kernel 2"], by_name["_scale_kernel 3"]
    elements = 1024 // (4 * TARGETS[target].warp_size)
    assert copy.elements == fill.elements == elements
    assert copy.loads == copy.stores == {128: elements // 4}
    assert fill.loads == {}
    assert fill.stores == {128: elements // 4}
    # both sides of the branch are in it: a cosine has some twenty instructions for each element at the very least
    assert copy.instructions_per_element > 20 > 10 > fill.instructions_per_element > 0.5, loops
    assert copy.instructions == copy.instructions_per_element * elements


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_code_without_such_a_loop_is_refused(target):
    compiled = compile_case(case(), target)
    pretended = CompileCase("other", _scale_kernel, {}, {"BLOCK": 4096}, options={"num_warps": 4})
    with pytest.raises(ValueError, match=r"other: no loop with a load or store of a tile of \[4096\]"):
        tile_loops(pretended, compiled, target)
