"""The multi-normalization kernel on matrices whose rows are in several processes, against the same in one."""

import pytest

from multinorm_pieces import (
    assert_bad_rows_stop_all,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_rule,
)


@each_rule
@each_cut
def test_pieces_do_what_the_whole_does(name, rows, shapes):
    assert_pieces_do_what_the_whole_does(name, rows, shapes, "triton")


@pytest.mark.parametrize("name", ["sinkgd", "momentum after", "signs"])
@each_cut
def test_noise_is_that_of_the_whole(name, rows, shapes):
    assert_noise_is_that_of_the_whole(name, rows, shapes, "triton")


@pytest.mark.parametrize("name", ["sinkgd", "columns first", "frobenius", "frobenius alone", "table"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("transform", [{}, {"clip_value": 0.5}], ids=["plain", "clipped"])
def test_bad_rows_stop_all(name, transform, bad):
    """Of which a clamp would hide an Inf."""
    assert_bad_rows_stop_all(name, bad, "triton", **transform)
