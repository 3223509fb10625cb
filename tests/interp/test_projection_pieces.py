"""The projection kernels do not take matrices whose rows are in several processes, and say so."""

import pytest
import torch

from pieces import Rows
from projection_pieces import runs


def test_kernels_refuse_pieces():
    with pytest.raises(ValueError, match=r"there are pieces and the backend is 'triton'; allowed: backend='torch'"):
        runs("rank_4", Rows(2), [(8, 4)], torch.float32, 1, "triton")
