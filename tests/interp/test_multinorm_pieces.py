"""The multi-normalization kernel on matrices whose rows are in several processes, against the same in one."""

import pytest
import torch

from lowmem_kernels.numerics import parity_tolerance
from multinorm_pieces import SHAPES, STEPS, PiecesContract, assert_pieces_do_what_the_whole_does, runs
from pieces import Rows, random_tensors


class TestKernel(PiecesContract):
    backend = "triton"


@pytest.mark.parametrize("name", ["sinkgd", "eps", "frobenius", "momentum after", "table"])
def test_rows_that_no_program_holds(name):
    """One process has nothing of the first: then no program has written its sums."""
    assert_pieces_do_what_the_whole_does(name, Rows(2), [(1, 2051), (3, 2051)], "triton")


@pytest.mark.parametrize("name", ["sinkgd", "columns first", "frobenius", "momentum after", "table"])
def test_transposed_in_memory(name):
    """Lines are rows there too, which do not lie in one piece."""
    assert_pieces_do_what_the_whole_does(
        name, Rows(2), [(40, 24), (2, 8, 16), (7, 70), (1, 33)], "triton", arrange=lambda x: x.mT.contiguous().mT
    )


@pytest.mark.parametrize("name", ["sinkgd", "frobenius", "table"])
def test_sums_that_overflow_stop_all(name):
    """Of finite elements, in either implementation."""

    def change(step, grads):
        if step == 1:
            grads[0][-1, 3] = 3e38
        return grads

    for backend in ("torch", "triton"):
        whole, several, _ = runs(name, Rows(2), SHAPES[:2], torch.float32, backend, change)
        for run in (whole, *several):
            assert [int(s) for s in run.steps] == [STEPS - 1, STEPS]
            assert int(run.skipped) == 1


@pytest.mark.parametrize("name", ["sinkgd", "table"])
def test_reference(name):
    """The same pieces in torch."""
    rows = Rows(3)
    expected, found = (runs(name, rows, SHAPES, torch.float32, backend)[1] for backend in ("torch", "triton"))
    for i, start in enumerate(random_tensors(SHAPES, torch.float32, 0)):
        x, y = (rows.gathered([run.params[i] for run in several], start) for several in (expected, found))
        assert (y - x).norm() <= parity_tolerance(start, x, STEPS), i
