"""The factored kernels on matrices whose rows are in several processes, against the same in one."""

import pytest

from factored_pieces import (
    assert_bad_rows_stop_all,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_dialect,
)


@each_dialect
@each_cut
def test_pieces_do_what_the_whole_does(dialect, rows, shapes):
    assert_pieces_do_what_the_whole_does(dialect, rows, shapes, "triton")


@pytest.mark.parametrize("dialect", ["external", "came"])
@each_cut
def test_noise_is_that_of_the_whole(dialect, rows, shapes):
    assert_noise_is_that_of_the_whole(dialect, rows, shapes, "triton")


@each_dialect
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("transform", [{}, {"clip_value": 0.5}], ids=["plain", "clipped"])
def test_bad_rows_stop_all(dialect, transform, bad):
    """Of which a clamp would hide an Inf."""
    assert_bad_rows_stop_all(dialect, bad, "triton", **transform)
