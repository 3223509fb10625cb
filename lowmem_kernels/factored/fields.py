"""What the host tells the kernels, and where: one list of names for schedule.py, launch.py and the kernels.

FIELDS is what a kernel reads of each parameter besides its addresses: a row of int64, written by schedule.py.
A parameter is a stack of ``matrices``, n x m. One whose second moment is kept in full is a single matrix with m = the
width of a tile, whose last row may be short. A matrix is cut into ``groups`` of ``group_rows`` rows; a ticket is one
group, or ``batch`` whole matrices where they are small. Offsets count float32 elements from the start of the scratch.
"""

FIELDS = (
    "key",  # tensor_key of the rounding noise
    "full",  # 1: the second moment is kept in full
    "numel",  # of the whole parameter, where its rows are in pieces
    "matrices",
    "n",
    "m",
    "last",  # elements of the last row
    "group_rows",
    "groups",
    "batch",
    "tickets",  # of every phase but the column phases
    "slab_tickets",  # column tickets of a matrix (or of a batch)
    "slab_width",  # columns of such a ticket
    "col_tickets",
    "update_sums",  # how many partial sums of u² there are after the column phase
    # of the whole, of which this may be a piece: rows, and where those here are (see pieces.RowPlace)
    "rows",
    "first_row",
    "run",
    "distance",
    # of a piece, where its sums start in the vector that is added up over processes: matrices x 2 x m column sums of g²
    # and g²/R, matrices sums of R, the sum of p²; and matrices x m and matrices of CAME's residual
    "sums",
    "res_sums",
    # offsets in the scratch, with what lies there
    "new_row",  # matrices x n
    "new_col",  # matrices x m
    "col_scale",  # matrices x m: 1 / sqrt(new C)
    "row_mean",  # matrices
    "partial",  # matrices x groups x 2 x m: sums of g² and of g²/R over the group's rows; shared, see tickets.py
    "row_sum",  # matrices x groups: sum of the new R
    "row_min",  # matrices x groups: smallest R that has a gradient
    "param_sum",  # tickets: sum of p², before the update where it is needed, then after it
    "update_sum",  # sums of u²
    "floored",  # col_tickets: above 0 where the floor under V is felt, NaN where a sum is not finite
    "scalars",  # see SCALARS
    "res_row",  # as new_row, new_col, col_scale and row_mean, of CAME's residual
    "res_col",
    "res_scale",
    "res_mean",
    # of a parameter or gradient that is not contiguous: (size, stride of p, stride of g) of the dimensions before the
    # last two, innermost first, from `dims` in the table on
    "dims",
    "ndim",
    "param_row_stride",
    "param_col_stride",
    "grad_row_stride",
    "grad_col_stride",
)

#: Addresses of a parameter's tensors; 0 where there is none.
COLUMNS = ("param", "grad", "row", "col", "step", "exp_avg", "param_sum", "res_row", "res_col")

#: Phases of all rules, in order. Pieces go through "sums" and "residual_sums", after which the host adds up processes.
PHASES = ("look", "sums", "columns", "floor", "residual", "residual_sums", "residual_columns", "apply")

#: What a parameter's scalars in the scratch are.
SCALARS = (
    "ok",  # 1 where the parameter is to be updated
    "step_size",  # what multiplies g / sqrt(V)
    "decay",  # what multiplies p
    "felt",  # above 0 where the floor under V is felt
)

#: Columns of a ticket of the column phases: 128 bytes of each group's sums, and at most 128 KB of all groups'. The
#: wider the slab, the longer all programs wait for the last one.
SLAB = 32
