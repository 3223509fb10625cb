"""The names of fields.py as constants of the kernels; those of LINE_FIELDS are in line_fragments.py."""

import triton.language as tl

from ...lines import LINE_FIELDS
from ..fields import COLUMNS, FIELDS
from ..fields import SUMS as _SUMS
from ..rule import NORM_EPS as _NORM_EPS
from ..rule import TINY_NORM as _TINY_NORM

(
    DRAW_KEY, RANK, PROBES, MOMENT_LINES, MOMENT_GROUPS, MOMENT_BATCH,
    PROJECTED, SQUARES, PROBE, CHANNEL_SCALE, SUM, FACTOR, OK,
    WHOLE_ROWS, FIRST_ROW, RUN, DISTANCE, MATRIX_SUMS,
) = [tl.constexpr(i) for i in range(len(LINE_FIELDS), len(FIELDS))]  # fmt: skip
FIELDS_SIZE, SUMS = tl.constexpr(len(FIELDS)), tl.constexpr(_SUMS)

(
    P_COLUMN, G_COLUMN, STEP_COLUMN, EXP_AVG_COLUMN, EXP_AVG_SQ_COLUMN, NORM_COLUMN, EPOCH_COLUMN, PROJECTION_COLUMN,
    SCALE_COLUMN,
) = [tl.constexpr(i) for i in range(len(COLUMNS))]  # fmt: skip
COLUMNS_SIZE = tl.constexpr(len(COLUMNS))

NORM_EPS, TINY_NORM = tl.constexpr(_NORM_EPS), tl.constexpr(_TINY_NORM)
