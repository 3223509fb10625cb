"""The factored kernels on matrices whose rows are in several processes, against the same in one."""

import pytest

from factored_pieces import (
    assert_bad_rows_stop_all,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_dialect,
)
from pieces import each_bad


@each_dialect
@each_cut
def test_pieces_do_what_the_whole_does(dialect, rows, shapes):
    assert_pieces_do_what_the_whole_does(dialect, rows, shapes, "triton")


@pytest.mark.parametrize("dialect", ["external", "came"])
@each_cut
def test_noise_is_that_of_the_whole(dialect, rows, shapes):
    assert_noise_is_that_of_the_whole(dialect, rows, shapes, "triton")


@each_dialect
@each_bad
def test_bad_rows_stop_all(dialect, transform, bad):
    assert_bad_rows_stop_all(dialect, bad, "triton", **transform)
