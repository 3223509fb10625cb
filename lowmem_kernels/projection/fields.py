"""What the host tells the kernel, and where: one list of names for schedule.py, launch.py and the kernels.

Lines (see lines.py) are channels, and places are what is contracted. Offsets count float32 elements from the start of
the scratch; where contracted rows are in several processes, "projected" and "squares" count from that of the sums.
"""

from ..lines import LINE_FIELDS

FIELDS = (
    *LINE_FIELDS,
    "draw_key",  # Philox key of the parameter's own projection
    "rank",
    "probes",  # tickets of the first read
    "moment_lines",  # channels of a ticket of moments
    "moment_groups",  # such tickets of a matrix
    "moment_batch",  # matrices of such a ticket, where they are small
    # offsets in the scratch, with what lies there
    "projected",  # matrices x channels x rank, as the moments lie in memory; shared, see tickets.py
    "squares",  # matrices x channels: sums of squares of the gradient
    "probe",  # first read's tickets: sums of squares
    "channel_scale",  # matrices x channels
    "sums",  # matrices x moment_groups x 3: of |R~|^2, |R|^2, and the squared norm of what moves the parameter
    "factor",  # matrices: what multiplies lr and the channels' scales
    "ok",  # 1 where the parameter is to be updated; of a piece its sum of squares, in the sums
    # of a piece: rows of the whole matrices, which of them are here (see pieces.RowPlace), and where sums over its
    # moments start in the sums, see `schedule.pieces_of`
    "whole_rows",
    "first_row",
    "run",
    "distance",
    "matrix_sums",
)

#: Sums of a ticket of moments.
SUMS = 3

#: Addresses of a parameter's tensors; 0 where there is none.
COLUMNS = ("param", "grad", "step", "exp_avg", "exp_avg_sq", "norm", "epoch", "projection", "scale")
