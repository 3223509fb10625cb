"""Multi-normalization on matrices whose rows are in several processes, against the same in one."""

import pytest
import torch

from lowmem_kernels.multinorm import NormRule, sinkhorn_update_
from lowmem_kernels.pieces import RowPieces, RowPlace
from multinorm_pieces import PiecesContract, runs
from pieces import Rows


class TestReference(PiecesContract):
    backend = "torch"


def test_found_inf_stops_all():
    """It is the same in all processes, which change nothing then."""
    whole, several, _ = runs("table", Rows(2), [(5, 16)], torch.float32, "torch", found_inf=torch.ones(()))
    for run in (whole, *several):
        assert not any(run.steps)
        assert not run.skipped
        assert not any(m.any() for m in run.exp_avgs)
    assert torch.equal(Rows(2).gathered([run.params[0] for run in several], whole.params[0]), whole.params[0])


def test_refusals():
    def update(rows, places=1, shape=(4, 3), **rule):
        p = [torch.ones(shape)]
        pieces = RowPieces(rows, (RowPlace(0, 4, 0),) * places, lambda vector: None)
        sinkhorn_update_(
            p, p, [torch.zeros(())], lr=1e-3, weight_decay=0.0, rule=NormRule(**rule), pieces=pieces, backend="torch"
        )

    with pytest.raises(ValueError, match=r"pieces.rows has 2 entries; allowed: 1"):
        update((4, 4))
    with pytest.raises(ValueError, match=r"pieces.places has 0 entries; allowed: 1"):
        update((4,), 0)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(4, 3\) and pieces.rows\[0\] is 3"):
        update((3,))
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(4,\)"):
        update((4,), shape=(4,))
    with pytest.raises(ValueError, match=r"params\[0\] has 3 dimensions and rule.conv is True"):
        update((4,), shape=(2, 4, 3), conv=True)
