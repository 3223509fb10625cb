"""What the host tells the kernels, and where: one list of names for schedule.py, launch.py and the kernels.

What a program holds as a whole are lines, see lines.py. Offsets count float32 elements from the start of the scratch.
"""

from ..lines import LINE_FIELDS

FIELDS = (
    *LINE_FIELDS,
    "slab_tickets",  # closing tickets of a matrix (or of a batch) where sums over lines are added up
    "slab_width",  # places of such a ticket
    "closing_tickets",  # of the last closing phase
    # of the whole, of which this may be a piece: lines, and which of them these are (see pieces.RowPlace)
    "whole_lines",
    "first_line",
    "run",
    "distance",
    # of a piece, where its sums start in a vector that is added up over processes: matrices x length, or matrices
    "cross_sums",
    "single_sums",
    # offsets in the scratch, with what lies there
    "line_scale",  # matrices x lines
    "cross_scale",  # matrices x length
    "partial",  # matrices x groups x length: sums of squares over the group's lines; shared, see tickets.py
    "group_sum",  # matrices x groups: of the lines' norms, or of all squares
    "line_norm",  # matrices x lines: of the gradient, for the threshold
    "threshold",  # matrices: lines with a smaller norm become zero
    "factor",  # matrices: sqrt(elements) / norm
    "probe",  # tickets: 0, or NaN where a sum is not finite
    "ok",  # 1 where the parameter is to be updated
)

#: Addresses of a parameter's tensors; 0 where there is none.
COLUMNS = ("param", "grad", "step", "exp_avg", "row_scale", "col_scale", "row_offset", "col_offset")

#: Places of a ticket of a closing phase: 128 bytes of each group's sums.
SLAB = 32
