"""The projection kernels on matrices whose rows are in several processes, against the same in one."""

import pytest

from projection_pieces import (
    assert_bad_rows_stop_all,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_dialect,
)

STEPS = 3


@each_dialect
@each_cut
def test_pieces_do_what_the_whole_does(dialect, rows, shapes):
    assert_pieces_do_what_the_whole_does(dialect, rows, shapes, "triton", STEPS)
