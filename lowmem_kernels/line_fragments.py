"""Finding the way from a ticket to its lines and tiles: the device's part of lines.py, shared by kernels.

``at`` is (table_ptr, row_ptr, scratch_ptr) as in field_fragments.py; the row starts with LINE_FIELDS.
"""

import triton
import triton.language as tl

from .field_fragments import field, field32, walk_dims
from .lines import LINE_FIELDS as _LINE_FIELDS

(
    KEY, MATRICES, LINES, LENGTH, GROUP_LINES, GROUPS, BATCH,
    MATRIX_DIMS, MATRIX_NDIM, LINE_DIMS, LINE_NDIM, PLACE_DIMS, PLACE_NDIM,
) = [tl.constexpr(i) for i in range(len(_LINE_FIELDS))]  # fmt: skip


@triton.jit
def extents(at, ALIGNED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(lines, length) of a matrix.

    Where ALIGNED, what lies side by side in memory is a multiple of 8, as a product, so that the compiler can prove
    that a mask never cuts a vector.
    """
    lines = field32(at, LINES)
    length = field32(at, LENGTH)
    if ALIGNED:
        if CONTIGUOUS:
            length = (length // 8) * 8
        else:
            lines = (lines // 8) * 8
    return lines, length


@triton.jit
def matrices_of(at, ticket, tickets):
    """(first, end) of the matrices of a ticket, of which ``tickets`` share a matrix."""
    first = (ticket // tickets) * field32(at, BATCH)
    return first, tl.minimum(first + field32(at, BATCH), field32(at, MATRICES))


@triton.jit
def lines_of(at, ticket, lines, ALIGNED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(group, first line, end line) of a ticket; the last two are seen to be multiples of 8 as in `extents`."""
    group = ticket % field32(at, GROUPS)
    group_lines = field32(at, GROUP_LINES)
    if ALIGNED and not CONTIGUOUS:
        group_lines = (group_lines // 8) * 8
    first = group * group_lines
    return group, first, tl.minimum(first + group_lines, lines)


@triton.jit
def matrix(at, pointer, e, size, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Pointer to matrix e of p (OPERAND 0), g (1), or something contiguous (2)."""
    if STRIDED and OPERAND != 2:
        return pointer + walk_dims(at, field(at, MATRIX_DIMS), field32(at, MATRIX_NDIM), e, OPERAND, 2)
    else:
        return pointer + e.to(tl.int64) * size


@triton.jit
def offsets(at, lines, places, extent, OPERAND: tl.constexpr, STRIDED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Offsets of a tile in memory from the start of its matrix, int64. CONTIGUOUS: lines lie in one piece."""
    count, length = extent
    if STRIDED and OPERAND != 2:
        line_offsets = walk_dims(at, field(at, LINE_DIMS), field32(at, LINE_NDIM), lines, OPERAND, 2)
        place_offsets = walk_dims(at, field(at, PLACE_DIMS), field32(at, PLACE_NDIM), places, OPERAND, 2)
        return line_offsets[:, None] + place_offsets[None, :]
    elif CONTIGUOUS:
        return lines.to(tl.int64)[:, None] * length + places[None, :]
    else:
        return places.to(tl.int64)[None, :] * count + lines[:, None]
