"""The inspection tools on kernels whose code is known."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl

from lowmem_kernels.testing.aot import TARGETS, CompileCase, compile_case, inspect_kernel, narrow_offsets


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


@triton.jit
def _center_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    # the whole tile is live until its maximum is known
    tl.store(y_ptr + offs, x - tl.max(x))


@triton.jit
def _gram_kernel(x_ptr, y_ptr, steps, K: tl.constexpr):
    offs = tl.arange(0, K)
    total = tl.zeros((K, K), dtype=tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + step * K * K + offs[:, None] * K + offs[None, :])
        total = tl.dot(x, x, total)
    tl.store(y_ptr + offs[:, None] * K + offs[None, :], total)


@triton.jit
def _add_row(base_ptr, row, stride):
    return base_ptr + row * stride


@triton.jit
def _offsets_kernel(table_ptr, wide_ptr, inlined_ptr, absent_ptr, stride, N: tl.constexpr):
    offs = tl.arange(0, N)
    row = tl.program_id(0)
    from_table = tl.load(table_ptr + row).to(tl.pointer_type(tl.float32))
    x = tl.load(wide_ptr + row.to(tl.int64) * stride + offs.to(tl.int64))
    for _ in range(stride):
        if absent_ptr is None:
            x += tl.load(from_table + offs)
        else:
            x += tl.load(absent_ptr + offs)
    tl.store(_add_row(inlined_ptr, row, stride) + offs[None, :], x[None, :])


@triton.jit
def _count_kernel(count_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(count_ptr + tl.arange(0, BLOCK), 1.0, sem="relaxed")
    tl.atomic_cas(count_ptr.to(tl.pointer_type(tl.int32)), 0, 1)


def _copy_case(dtype: str = "bf16", aligned: bool = True, num_warps: int = 4) -> CompileCase:
    return CompileCase(
        name=f"copy-{dtype}-{'aligned' if aligned else 'ragged'}",
        kernel=_copy_kernel,
        signature={"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "n": "i64"},
        constexprs={"BLOCK": 1024},
        divisible_by_16=("x_ptr", "y_ptr", "n") if aligned else (),
        options={"num_warps": num_warps},
    )


def _center_case(block: int, **options: Any) -> CompileCase:
    pointers = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    return CompileCase(
        "center", _center_kernel, pointers, {"BLOCK": block}, tuple(pointers), {"num_warps": 1, **options}
    )


@pytest.mark.parametrize("target_name", TARGETS)
def test_aligned_copy_is_wide(target_name: str) -> None:
    report = inspect_kernel(compile_case(_copy_case(), target_name), target_name)
    threads = 4 * TARGETS[target_name].warp_size
    # a thread of the smaller warps copies 8 bf16 at once; the 1024 elements give AMD's threads 4 each
    bits = 1024 * 16 // threads
    assert report.loads == report.stores == {bits: 1}
    assert report.widest == bits
    assert report.narrow_loads(below_bits=bits) == report.narrow_stores(below_bits=bits) == 0
    assert report.narrow_loads(below_bits=bits + 1) == 1
    assert not report.spilled
    assert report.stack_bytes == report.spills == report.atomics == report.shared_bytes == 0
    assert 4 <= report.registers <= 40
    assert 10 <= report.instructions <= 100
    assert report.occupancy == 1


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize(("dtype", "bits"), [("i8", 8), ("bf16", 16), ("fp32", 32), ("fp64", 64)])
def test_ragged_copy_is_narrow(target_name: str, dtype: str, bits: int) -> None:
    report = inspect_kernel(compile_case(_copy_case(dtype, aligned=False), target_name), target_name)
    per_thread = 1024 // (4 * TARGETS[target_name].warp_size)
    assert report.loads == report.stores == {bits: per_thread}
    assert report.narrow_loads(below_bits=128) == report.narrow_stores(below_bits=128) == per_thread


def test_asynchronous_copies_are_loads() -> None:
    pointers = {"x_ptr": "*bf16", "y_ptr": "*fp32"}
    options = {"num_warps": 4, "num_stages": 3}
    case = CompileCase("gram", _gram_kernel, {**pointers, "steps": "i32"}, {"K": 32}, tuple(pointers), options)
    compiled = compile_case(case, "sm_80")
    assert "cp.async" in compiled.asm["ptx"]
    report = inspect_kernel(compiled, "sm_80")
    assert report.loads.keys() == {128}
    assert report.shared_bytes > 0


@pytest.mark.parametrize(
    ("target_name", "fewer_registers"), [("sm_90", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})]
)
def test_spills_are_seen(target_name: str, fewer_registers: dict[str, int]) -> None:
    free = inspect_kernel(compile_case(_center_case(4096), target_name), target_name)
    starved = inspect_kernel(compile_case(_center_case(4096, **fewer_registers), target_name), target_name)
    assert not free.spilled
    assert starved.spilled
    assert starved.spills > 0
    assert starved.stack_bytes > 0
    assert starved.registers < free.registers


def test_occupancy_by_registers_agrees_with_llvm() -> None:
    for block in (1024, 4096, 8192, 16384):
        compiled = compile_case(_center_case(block), "gfx942")
        waves = int(re.findall(r"^; Occupancy: (\d+)$", compiled.asm["amdgcn"], re.MULTILINE)[0])
        assert inspect_kernel(compiled, "gfx942").occupancy == waves / 8


@pytest.mark.parametrize(("registers", "waves"), [(64, 8), (65, 7), (80, 6), (85, 5), (128, 4), (129, 3), (257, 1)])
def test_registers_are_granted_by_eights(registers: int, waves: int) -> None:
    compiled = compile_case(_copy_case(num_warps=1), "gfx942")
    listing, replaced = re.subn(r"(\.vgpr_count: +)\d+", rf"\g<1>{registers}", compiled.asm["amdgcn"])
    assert replaced == 1
    report = inspect_kernel(_pretend(compiled, asm={"amdgcn": listing}), "gfx942")
    assert report.registers == registers
    assert report.occupancy == waves / 8


@pytest.mark.parametrize(
    ("target_name", "kibibytes"), [("sm_80", 164), ("sm_90", 228), ("sm_100", 228), ("gfx942", 64)]
)
def test_occupancy_by_shared_memory(target_name: str, kibibytes: int) -> None:
    compiled = compile_case(_copy_case(num_warps=8), target_name)
    reserved, warps = (0, 32) if target_name == "gfx942" else (1024, 64)
    two_fit = (kibibytes << 9) - reserved
    for shared, blocks in ((two_fit, 2), (two_fit + 1, 1)):
        report = inspect_kernel(_pretend(compiled, shared=shared), target_name)
        assert report.shared_bytes == shared
        assert report.programs == blocks
        assert report.occupancy == blocks * 8 / warps


def _pretend(compiled: Any, asm: dict[str, Any] | None = None, **metadata: Any) -> Any:
    """The compiled kernel with other code or metadata."""
    return SimpleNamespace(name=compiled.name, asm=asm or compiled.asm, metadata=compiled.metadata._replace(**metadata))


@pytest.mark.parametrize("target_name", TARGETS)
def test_atomics_are_counted(target_name: str) -> None:
    case = CompileCase("count", _count_kernel, {"count_ptr": "*fp32"}, {"BLOCK": 256}, options={"num_warps": 4})
    report = inspect_kernel(compile_case(case, target_name), target_name)
    assert report.atomics == 1 + 256 // (4 * TARGETS[target_name].warp_size)
    assert report.loads == report.stores == {}
    assert report.widest == 0


def test_narrow_offsets_are_found() -> None:
    compiled = compile_case(
        CompileCase(
            name="offsets",
            kernel=_offsets_kernel,
            signature={"table_ptr": "*i64", "wide_ptr": "*fp32", "inlined_ptr": "*fp32", "stride": "i32"},
            constexprs={"N": 64, "absent_ptr": None},
        ),
        "sm_90",
    )
    found = narrow_offsets(compiled)
    assert [(offset.pointer, offset.offset_type) for offset in found] == [
        ("table_ptr", "i32"),
        ("from_table", "tensor<64xi32>"),
        ("inlined_ptr", "i32"),
        ("inlined_ptr", "tensor<1x64xi32>"),
    ]
    inlined_line = _add_row.fn.__code__.co_firstlineno + 2
    assert found[2].source == f"test_testing_tools.py:{inlined_line}"
    assert narrow_offsets(compile_case(_copy_case(), "gfx942")) == []


def test_misdescribed_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="each of x_ptr, y_ptr, BLOCK once"):
        compile_case(CompileCase("missing", _center_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 64}), "sm_90")
    pointers = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    with pytest.raises(ValueError, match="divisible_by_16 names BLOCK"):
        compile_case(CompileCase("constexpr", _center_kernel, pointers, {"BLOCK": 64}, ("BLOCK",)), "sm_90")
    with pytest.raises(ValueError, match="not for sm_80"):
        inspect_kernel(compile_case(_copy_case(), "sm_90"), "sm_80")
