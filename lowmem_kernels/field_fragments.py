"""A parameter's (or matrix's) row of fields in a table, and what other programs left in the scratch. Shared by kernels.

``at`` is (table_ptr, row_ptr, scratch_ptr): the table, the row of fields in it, and the scratch; families without
tickets have their addresses there instead. Each family has its own list of fields; their numbers are passed as
constants.
"""

import triton
import triton.language as tl

# partial sums, and groups of them, that are added at a time: as many loads in flight as there are registers for
_SUMS_AT_A_TIME = tl.constexpr(256)
_GROUPS_AT_A_TIME = tl.constexpr(128)


@triton.jit
def field(at, FIELD: tl.constexpr):
    """A field of the row, int64."""
    _, row_ptr, _ = at
    return tl.load(row_ptr + FIELD)


@triton.jit
def field32(at, FIELD: tl.constexpr):
    """A field that is known to fit into 32 bits."""
    return field(at, FIELD).to(tl.int32)


@triton.jit
def scratch(at, FIELD: tl.constexpr):
    """Pointer to what the scratch holds under a field."""
    _, row_ptr, scratch_ptr = at
    return scratch_ptr + tl.load(row_ptr + FIELD)


@triton.jit
def column_address(address_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer in a column of the parameter's addresses, see fragments.address."""
    pointer = tl.load(address_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def walk_dims(at, first, count, index, OPERAND: tl.constexpr, OPERANDS: tl.constexpr):
    """Offset in elements of an index over ``count`` dimensions, innermost first: (size, stride of each operand)."""
    table_ptr, _, _ = at
    dims_ptr = table_ptr + first
    index = index.to(tl.int64)
    offset = index * 0
    for dim in range(count):
        extent = tl.load(dims_ptr + (1 + OPERANDS) * dim)
        offset += (index % extent) * tl.load(dims_ptr + (1 + OPERANDS) * dim + 1 + OPERAND)
        index = index // extent
    return offset


@triton.jit
def rows_in_whole(at, rows, FIRST: tl.constexpr):
    """Which rows of the whole these rows of a piece are, int64; fields FIRST to FIRST + 2 are a pieces.RowPlace."""
    run = field32(at, FIRST + 1)
    return field(at, FIRST) + (rows // run) * field(at, FIRST + 2) + rows % run


@triton.jit
def by_fours(x):
    """Sums of four neighbours in a row: one thread has them, and an accumulator takes a quarter of the registers."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 4)), 2)


@triton.jit
def sum_of(pointer, count):
    """Sum of ``count`` numbers that other programs have written, in an order that depends on count only."""
    total = tl.zeros((_SUMS_AT_A_TIME,), tl.float32)
    lane = tl.arange(0, _SUMS_AT_A_TIME)
    for start in range(0, count, _SUMS_AT_A_TIME):
        total += tl.load(pointer + start + lane, mask=start + lane < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def sum_groups(pointer, groups, spacing, cols, m, SLAB: tl.constexpr, BOTH: tl.constexpr):
    """Column sums over the groups of a matrix, which lie ``spacing`` apart: in their order, 128 at a time as a tree.

    Those of each group's first m numbers, and of its second m where BOTH, else 0.
    """
    first = tl.zeros((SLAB,), tl.float32)
    second = tl.zeros((SLAB,), tl.float32)
    for start in range(0, groups, _GROUPS_AT_A_TIME):
        group = start + tl.arange(0, _GROUPS_AT_A_TIME)
        pointers = pointer + group.to(tl.int64)[:, None] * spacing + cols[None, :]
        mask = (group < groups)[:, None] & (cols < m)[None, :]
        first += tl.sum(tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        if BOTH:
            second += tl.sum(tl.load(pointers + m, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return first, second
