"""The names of fields.py as constants of the kernels."""

import triton.language as tl

from ..fields import COLUMNS, FIELDS
from ..fields import SLAB as _SLAB
from ..rule import TINY as _TINY

(
    KEY, MATRICES, LINES, LENGTH, GROUP_LINES, GROUPS, BATCH, SLAB_TICKETS, SLAB_WIDTH, CLOSING_TICKETS,
    LINE_SCALE, CROSS_SCALE, PARTIAL, GROUP_SUM, LINE_NORM, THRESHOLD, FACTOR, PROBE, OK,
    MATRIX_DIMS, MATRIX_NDIM, LINE_DIMS, LINE_NDIM, PLACE_DIMS, PLACE_NDIM,
) = [tl.constexpr(i) for i in range(len(FIELDS))]  # fmt: skip
FIELDS_SIZE = tl.constexpr(len(FIELDS))

(
    P_COLUMN, G_COLUMN, STEP_COLUMN, EXP_AVG_COLUMN, ROW_SCALE_COLUMN, COL_SCALE_COLUMN, ROW_OFFSET_COLUMN,
    COL_OFFSET_COLUMN,
) = [tl.constexpr(i) for i in range(len(COLUMNS))]  # fmt: skip
COLUMNS_SIZE = tl.constexpr(len(COLUMNS))

SLAB = tl.constexpr(_SLAB)
TINY = tl.constexpr(_TINY)
