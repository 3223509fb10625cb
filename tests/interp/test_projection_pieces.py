"""The projection kernels on matrices whose rows are in several processes, against the same in one."""

import pytest
import torch

from lowmem_kernels.numerics import parity_tolerance
from pieces import Rows, each_bad, random_tensors
from projection_pieces import (
    BY_CHANNEL,
    SHAPES,
    assert_bad_rows_stop_all,
    assert_each_step_is_exact,
    assert_found_inf_stops_all,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_dialect,
    runs,
)

#: With a new projection in the third.
STEPS, REDRAW = 3, 2


@each_dialect
@each_cut
def test_pieces_do_what_the_whole_does(dialect, rows, shapes):
    assert_pieces_do_what_the_whole_does(dialect, rows, shapes, "triton", STEPS, redraw=REDRAW)


@pytest.mark.parametrize("dialect", BY_CHANNEL)
@pytest.mark.parametrize("rows", [Rows(2), Rows(3), Rows(2, deal=2)], ids=["2", "3", "dealt"])
def test_rank_1_by_channels(dialect, rows):
    """Each step as exact as in one process."""
    shapes = [(40, 24), (24, 24), (8, 70), (4, 300)]
    assert_each_step_is_exact(dialect, rows, shapes, "triton", STEPS, redraw=REDRAW)


@pytest.mark.parametrize("dialect", ["mini", "rank_4", "left_tensor", "right"])
@each_cut
def test_noise_is_that_of_the_whole(dialect, rows, shapes):
    assert_noise_is_that_of_the_whole(dialect, rows, shapes, "triton")


@pytest.mark.parametrize("dialect", ["mini", "rank_4", "left_tensor"])
@each_bad
def test_bad_rows_stop_all(dialect, transform, bad):
    assert_bad_rows_stop_all(dialect, bad, "triton", **transform)


@pytest.mark.parametrize("dialect", ["mini", "rank_4"])
def test_found_inf_stops_all(dialect):
    assert_found_inf_stops_all(dialect, "triton")


@pytest.mark.parametrize("dialect", ["mini", "rank_4", "left"])
def test_transposed_in_memory(dialect):
    """There contracted rows lie in one piece, and channels of columns do not."""
    shapes = [(40, 24), (7, 70), (16, 33), (33, 3), (2, 8, 16)]
    assert_pieces_do_what_the_whole_does(
        dialect, Rows(2), shapes, "triton", 2, redraw=1, arrange=lambda x: x.mT.contiguous().mT
    )


@pytest.mark.parametrize("dialect", ["mini", "rank_4"])
@pytest.mark.parametrize("rows", [Rows(2), Rows(3)], ids=["2", "3"])
def test_more_than_a_tile(dialect, rows):
    """Several tickets of a piece, and of the moments of a matrix, whose contracted rows begin at 4 k or anywhere."""
    assert_pieces_do_what_the_whole_does(dialect, rows, [(140, 520), (520, 140)], "triton", 2, redraw=1)


@pytest.mark.parametrize("dialect", ["mini", "rank_4", "left_tensor"])
def test_reference(dialect):
    """The same pieces in torch."""
    rows = Rows(3)
    expected, found = (
        runs(dialect, rows, SHAPES, torch.float32, STEPS, backend, redraw=REDRAW)[1] for backend in ("torch", "triton")
    )
    for i, start in enumerate(random_tensors(SHAPES, torch.float32, 0)):
        x, y = (rows.gathered([run.params[i] for run in several], start) for several in (expected, found))
        assert (y - x).norm() <= parity_tolerance(start, x, STEPS), i
