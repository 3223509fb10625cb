"""The byte counter and the patches of the interpreter, on kernels small enough to count by hand."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from lowmem_kernels.testing.bytecount import Access, count_bytes, dram_bytes
from lowmem_kernels.testing.interpreter import install_round_to_nearest

WRAPPED = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride, mask=mask, other=0.0), mask=mask)


@triton.jit
def _atomic_kernel(count_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(count_ptr + offs, 1, mask=offs < n)
    tl.atomic_cas(lock_ptr, 0, 1)


@triton.jit
def _gather_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    x_ptr = tl.load(table_ptr + tl.arange(0, BLOCK)).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, MODE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if MODE == "explicit":
        x = x.to(y_ptr.dtype.element_ty)
    if MODE == "toward zero":
        x = x.to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(y_ptr + offs, x)


@triton.jit
def _later_kernel(x_ptr, y_ptr, first, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for i in range(0, 3):
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=(offs < 5) & (i > first), other=0.0))


@triton.jit
def _roots_kernel(y_ptr, x):
    tl.store(y_ptr, tl.sqrt(x))
    tl.store(y_ptr + 1, tl.rsqrt(x))


@triton.jit
def _square_kernel(y_ptr, x):
    tl.store(y_ptr, x * x)


@pytest.mark.parametrize(("dtype", "item"), [(torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_masked_copy_requests_exactly_its_elements(dtype: torch.dtype, item: int) -> None:
    n, storage = 1000, torch.empty(1100 * item + 128, dtype=torch.uint8)
    # from the start of a line, so that the lines are known
    aligned = storage[-storage.data_ptr() % 128 :]
    x, y = aligned[: n * item].view(dtype), torch.empty(n, dtype=dtype)
    x.normal_()
    with count_bytes({"x": x, "y": y}) as traffic:
        _copy_kernel[(4,)](x, y, n, 1, BLOCK=256)
    assert torch.equal(x, y)
    assert traffic.read == {"x": n * item}
    assert traffic.written == {"y": n * item}
    assert traffic.atomic == {}
    assert len(traffic.lines_read["x"]) == -(-n * item // 128)


def test_strided_read_touches_a_line_per_element() -> None:
    x, y = torch.randn(32 * 64), torch.empty(64)
    with count_bytes({"x": x[::32], "y": y}) as traffic:
        _copy_kernel[(1,)](x, y, 64, 32, BLOCK=64)
    assert traffic.read == {"x": 64 * 4}
    assert len(traffic.lines_read["x"]) == 64
    assert len(traffic.lines_written["y"]) <= 3


def test_atomics_are_counted_apart() -> None:
    count, lock = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with count_bytes({"count": count, "lock": lock}) as traffic:
        _atomic_kernel[(2,)](count, lock, 40, BLOCK=64)
    assert traffic.atomic == {"count": 2 * 40 * 4, "lock": 2 * 4}
    assert traffic.read == traffic.written == {}


def test_one_access_can_hit_several_tensors() -> None:
    a, b, stray, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0]), torch.empty(4)
    empty = torch.empty(0)
    table = torch.tensor([a.data_ptr(), a.data_ptr() + 4, b.data_ptr(), stray.data_ptr()])
    with count_bytes({"a": a, "both": [b, table, empty]}) as traffic:
        _gather_kernel[(1,)](table, y, BLOCK=4)
    assert y.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert traffic.read == {"a": 8, "both": 4 + 32, "other": 4}
    assert traffic.written == {"other": 16}


def test_a_tensor_ends_after_its_last_element() -> None:
    x, y = torch.randn(8), torch.empty(8)
    with count_bytes({"middle": x[2:5]}) as traffic:
        _copy_kernel[(1,)](x, y, 8, 1, BLOCK=8)
    assert traffic.read == {"middle": 12, "other": 20}


def test_counting_ends_with_the_block() -> None:
    def methods() -> list[object]:
        return [getattr(InterpreterBuilder, name) for name in WRAPPED]

    def fail() -> None:
        with count_bytes({}):
            assert not set(methods()) & set(before)
            raise RuntimeError("inside")

    before = methods()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert methods() == before


def test_overlapping_tensors_are_refused() -> None:
    x = torch.empty(8)
    with pytest.raises(ValueError, match="'head' and 'tail' overlap"), count_bytes({"tail": x[3:], "head": x[:4]}):
        pass
    matrix = torch.empty(4, 4)
    with count_bytes({"tail": x[4:], "head": x[:4], "matrix": matrix, "empty": [matrix[:, :0]] * 2}):
        pass


@pytest.fixture
def _rounding() -> Iterator[None]:
    before = InterpreterBuilder.cast_impl
    install_round_to_nearest()
    install_round_to_nearest()
    yield
    InterpreterBuilder.cast_impl = before


def _cast(x: torch.Tensor, dtype: torch.dtype, mode: str) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    block = min(x.numel(), 1 << 14)
    _cast_kernel[(x.numel() // block,)](x, y, BLOCK=block, MODE=mode)
    return y


def _assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, zeros with their sign, but any NaN equals any NaN."""
    integer = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(integer)[~nan], expected.view(integer)[~nan])


def _awkward_floats() -> torch.Tensor:
    """2**15 fp32 values: random bits, ties and their neighbours, subnormals, infinities and NaN."""
    random = np.random.default_rng(0).integers(0, 2**32, 2**14, dtype=np.uint32)
    ties = (random[: 2**12] & 0xFFFF0000) | 0x8000
    subnormal = random[: 2**12 - 8] & 0x807FFFFF
    special = np.array(
        [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF, 0xFF7FFFFF, 0x80000000],
        dtype=np.uint32,
    )
    bits = np.concatenate([random, ties, ties - 1, ties + 1, subnormal, special])
    assert bits.size == 2**15
    return torch.from_numpy(bits.view(np.float32))


def test_a_mask_of_scalars_is_a_mask() -> None:
    """The interpreter's comparison with a loop's counter is 0 or 1 in integers, which are no indices."""
    x, y = torch.ones(8), torch.zeros(8)
    with count_bytes({"x": x}) as traffic:
        _later_kernel[(1,)](x, y, 0, BLOCK=8)
    assert traffic.read["x"] == 2 * 5 * 4


@pytest.mark.usefixtures("_rounding")
@pytest.mark.parametrize("mode", ["explicit", "on store"])
def test_fp32_to_bf16_rounds_to_nearest_even(mode: str) -> None:
    x = _awkward_floats()
    _assert_same_bits(_cast(x, torch.bfloat16, mode), x.to(torch.bfloat16))


@pytest.mark.usefixtures("_rounding")
def test_rounding_toward_zero_still_truncates() -> None:
    x = torch.randn(1 << 10)
    _assert_same_bits(
        _cast(x, torch.bfloat16, "toward zero"), (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    )


@pytest.mark.usefixtures("_rounding")
def test_every_bf16_becomes_the_same_fp32() -> None:
    x = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    _assert_same_bits(_cast(x, torch.float32, "explicit"), x.to(torch.float32))


@pytest.mark.usefixtures("_rounding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64])
def test_other_types_to_bf16(dtype: torch.dtype) -> None:
    x = torch.randint(-1000, 1000, (1 << 10,)).to(dtype)
    _assert_same_bits(_cast(x, torch.bfloat16, "explicit"), x.to(torch.bfloat16))


@pytest.mark.parametrize(("x", "square"), [(1e-30, 0.0), (1e30, float("inf")), (3, 9.0)])
def test_numbers_are_fp32(x: float, square: float) -> None:
    """As on a GPU, and unlike Python numbers, whose squares would be 1e-60 and 1e60."""
    y = torch.full((1,), torch.nan, dtype=torch.float64)
    with np.errstate(over="ignore"):
        _square_kernel[(1,)](y, x)
    assert y.item() == square


@pytest.mark.parametrize(
    ("x", "roots"), [(4.0, [2.0, 0.5]), (1e-40, [0.0, float("inf")]), (2.0**-126, [2.0**-63, 2.0**63])]
)
def test_roots_of_subnormals_are_those_of_zero(x: float, roots: list[float]) -> None:
    y = torch.full((2,), torch.nan)
    _roots_kernel[(1,)](y, x)
    assert y.tolist() == roots


def access(lines, writes=False, name="x"):
    return Access(launch=0, program=0, writes=writes, name=name, lines=np.array(lines, dtype=np.uint64))


def test_a_cache_forgets_the_line_least_recently_used():
    trace = [access([1, 2]), access([1]), access([3]), access([1]), access([2])]
    # two lines: 3 takes the place of 2, and 2 that of 3
    assert dram_bytes(trace, 2 * 128) == ({"x": 4 * 128}, {})
    assert dram_bytes(trace, 3 * 128) == ({"x": 3 * 128}, {})
    assert dram_bytes(trace, 0) == ({"x": 6 * 128}, {})


def test_a_cache_writes_what_it_forgets_and_what_is_left():
    trace = [access([1], writes=True, name="y"), access([1], name="y"), access([2]), access([1], True, "y")]
    # line 1 need not be read before it is written, and goes to memory each time it is forgotten
    assert dram_bytes(trace, 128) == ({"x": 128}, {"y": 2 * 128})
    assert dram_bytes(trace, 2 * 128) == ({"x": 128}, {"y": 128})


def test_a_trace_has_every_access_in_order():
    x, y = torch.arange(256, dtype=torch.float32), torch.zeros(256)
    with count_bytes({"x": x, "y": y}) as traffic:
        for _ in range(2):
            _copy_kernel[(2,)](x, y, 256, 1, BLOCK=128)
    order = [(entry.launch, entry.program, entry.writes, entry.name, len(entry.lines)) for entry in traffic.trace]
    # 128 elements are four lines, or five where the tensor does not start with one
    assert [entry[:4] for entry in order] == [
        (launch, program, writes, name)
        for launch in range(2)
        for program in range(2)
        for writes, name in ((False, "x"), (True, "y"))
    ]
    assert all(entry[4] in (4, 5) for entry in order)
    lines = {int(line) for entry in traffic.trace for line in entry.lines if entry.name == "x"}
    assert lines == traffic.lines_read["x"]
