"""The names of fields.py as constants of the kernels."""

import triton.language as tl

from ..fields import COLUMNS, FIELDS, PHASES, SCALARS
from ..fields import SLAB as _SLAB

(
    KEY, FULL, NUMEL, MATRICES, N, M, LAST, GROUP_ROWS, GROUPS, BATCH, TICKETS, SLAB_TICKETS, SLAB_WIDTH, COL_TICKETS,
    UPDATE_SUMS, ROWS, FIRST_ROW, _, _, SUMS_START, RES_SUMS_START,
    NEW_ROW, NEW_COL, COL_SCALE, ROW_MEAN, PARTIAL, ROW_SUM, ROW_MIN, PARAM_SUM, UPDATE_SUM, FLOORED,
    SCALARS_START, RES_ROW, RES_COL, RES_SCALE, RES_MEAN, DIMS, NDIM, PARAM_STRIDES, _, GRAD_STRIDES, _,
) = [tl.constexpr(i) for i in range(len(FIELDS))]  # fmt: skip
FIELDS_SIZE = tl.constexpr(len(FIELDS))

(
    P_COLUMN, G_COLUMN, ROW_COLUMN, COL_COLUMN, STEP_COLUMN, EXP_AVG_COLUMN, PARAM_SUM_COLUMN, RES_ROW_COLUMN,
    RES_COL_COLUMN,
) = [tl.constexpr(i) for i in range(len(COLUMNS))]  # fmt: skip
COLUMNS_SIZE = tl.constexpr(len(COLUMNS))

LOOK, LOOK_SUMS, LOOK_COLUMNS, FLOOR, RESIDUAL, RESIDUAL_SUMS, RESIDUAL_COLUMNS, APPLY = [
    tl.constexpr(i) for i in range(len(PHASES))
]

OK, STEP_SIZE, DECAY, FELT = [tl.constexpr(i) for i in range(len(SCALARS))]

SLAB = tl.constexpr(_SLAB)
