"""The factored rules on matrices whose rows are in several processes, against the same in one."""

import pytest
import torch

from factored_pieces import (
    assert_bad_rows_stop_all,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_dialect,
)
from lowmem_kernels.factored import FactoredRule, factored_update_
from lowmem_kernels.pieces import RowPieces, RowPlace
from pieces import each_bad


@each_dialect
@each_cut
def test_pieces_do_what_the_whole_does(dialect, rows, shapes):
    assert_pieces_do_what_the_whole_does(dialect, rows, shapes, "torch")


@each_dialect
@each_cut
def test_noise_is_that_of_the_whole(dialect, rows, shapes):
    assert_noise_is_that_of_the_whole(dialect, rows, shapes, "torch")


@each_dialect
@each_bad
def test_bad_rows_stop_all(dialect, transform, bad):
    assert_bad_rows_stop_all(dialect, bad, "torch", **transform)


def test_refusals():
    p = [torch.ones(4, 3)]
    lists = (p, p, [torch.zeros(4)], [torch.zeros(3)], [torch.zeros(())])

    def update(rows, places=1, lists=lists, **rule):
        pieces = RowPieces(rows, (RowPlace(0, 4, 0),) * places, lambda vector: None)
        factored_update_(*lists, lr=1e-3, weight_decay=0.0, rule=FactoredRule(**rule), pieces=pieces)

    with pytest.raises(ValueError, match=r"pieces.rows has 2 entries; allowed: 1"):
        update((4, 4))
    with pytest.raises(ValueError, match=r"pieces.places has 0 entries; allowed: 1"):
        update((4,), 0)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(4, 3\) and pieces.rows\[0\] is 3"):
        update((3,))
    with pytest.raises(ValueError, match=r"rule.eps_floor is True and there are pieces"):
        update((4,), eps_floor=True)
    v = [torch.ones(4)]
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(4,\)"):
        update((4,), lists=(v, v, [torch.zeros(4)], [None], [torch.zeros(())]))
