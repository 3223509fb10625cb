"""APOLLO on matrices whose rows are in several processes, against the same in one."""

from dataclasses import replace

import pytest
import torch

from lowmem_kernels.pieces import RowPieces, RowPlace
from lowmem_kernels.projection import ApolloRule, Draw, apollo_update_
from lowmem_kernels.projection.rule import takes_pieces
from pieces import Rows, each_bad
from projection_pieces import (
    BY_CHANNEL,
    assert_bad_rows_stop_all,
    assert_each_step_is_exact,
    assert_noise_is_that_of_the_whole,
    assert_pieces_do_what_the_whole_does,
    each_cut,
    each_dialect,
)


@each_dialect
@each_cut
def test_pieces_do_what_the_whole_does(dialect, rows, shapes):
    assert_pieces_do_what_the_whole_does(dialect, rows, shapes, "torch")


@pytest.mark.parametrize("dialect", BY_CHANNEL)
@pytest.mark.parametrize("rows", [Rows(2), Rows(3), Rows(2, deal=2)], ids=["2", "3", "dealt"])
def test_rank_1_by_channels(dialect, rows):
    """As exact as in one process, where the 300 terms of some channel cancel to less than 1e-4 of their size."""
    least = assert_each_step_is_exact(dialect, rows, [(40, 24), (24, 24), (8, 70), (4, 300), (300, 400)], "torch")
    assert least < 1e-4


@each_dialect
@each_cut
def test_noise_is_that_of_the_whole(dialect, rows, shapes):
    assert_noise_is_that_of_the_whole(dialect, rows, shapes, "torch")


@each_dialect
@each_bad
def test_bad_rows_stop_all(dialect, transform, bad):
    assert_bad_rows_stop_all(dialect, bad, "torch", **transform)


def test_refusals():
    p, rule = [torch.ones(4, 3)], ApolloRule(1)

    def update(rows, places=1, rule=rule, moments=(4, 1), backend="torch"):
        pieces = RowPieces(rows, (RowPlace(0, 4, 0),) * places, lambda vector: None)
        state = [[torch.zeros(moments)], [torch.zeros(moments)], [torch.zeros(())], [torch.zeros(())]]
        options = {"lr": 1e-3, "weight_decay": 0.0, "rule": rule, "draw": Draw(), "pieces": pieces}
        apollo_update_(p, p, *state, [torch.zeros(())], backend=backend, **options)

    with pytest.raises(ValueError, match=r"pieces.rows has 2 entries; allowed: 1"):
        update((4, 4))
    with pytest.raises(ValueError, match=r"pieces.places has 0 entries; allowed: 1"):
        update((4,), 0)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(4, 3\) and pieces.rows\[0\] is 3"):
        update((3,))
    with pytest.raises(ValueError, match=r"rule.conv is True and there are pieces"):
        update((4,), rule=replace(rule, conv=True))
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has shape \(4, 1\)"):
        update((8,), rule=replace(rule, proj_type="left"))


@pytest.mark.parametrize("conv", [False, True])
def test_what_takes_pieces(conv):
    assert takes_pieces(ApolloRule(conv=conv)) == (not conv)
