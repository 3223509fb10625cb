"""The names of fields.py as constants of the kernels; those of LINE_FIELDS are in line_fragments.py."""

import triton.language as tl

from ...lines import LINE_FIELDS
from ..fields import COLUMNS, FIELDS
from ..fields import SLAB as _SLAB
from ..rule import TINY as _TINY

(
    SLAB_TICKETS, SLAB_WIDTH, CLOSING_TICKETS, WHOLE_LINES, FIRST_LINE, _, _, CROSS_SUMS, SINGLE_SUMS,
    LINE_SCALE, CROSS_SCALE, PARTIAL, GROUP_SUM, LINE_NORM, THRESHOLD, FACTOR, PROBE, OK,
) = [tl.constexpr(i) for i in range(len(LINE_FIELDS), len(FIELDS))]  # fmt: skip
FIELDS_SIZE = tl.constexpr(len(FIELDS))

(
    P_COLUMN, G_COLUMN, STEP_COLUMN, EXP_AVG_COLUMN, ROW_SCALE_COLUMN, COL_SCALE_COLUMN, ROW_OFFSET_COLUMN,
    COL_OFFSET_COLUMN,
) = [tl.constexpr(i) for i in range(len(COLUMNS))]  # fmt: skip
COLUMNS_SIZE = tl.constexpr(len(COLUMNS))

SLAB = tl.constexpr(_SLAB)
TINY = tl.constexpr(_TINY)
