"""The kernel of bench/evidence/ceilings.py reads every block as often as it says."""

import importlib
from pathlib import Path

import torch

EVIDENCE = Path(__file__).parent.parent.parent / "bench" / "evidence"


def test_every_block_is_read_as_often_as_any_other(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    ceilings = importlib.import_module("ceilings")
    programs, blocks, reads = 4, 12, 3
    # powers of two, so that a sum shows which blocks are in it and how often
    x = (4.0 ** torch.arange(blocks)).repeat_interleave(ceilings.BLOCK) / ceilings.BLOCK
    sums = torch.zeros(programs)
    stride = programs
    ceilings._read_kernel[(programs,)](
        x, sums, blocks, reads * blocks // programs, stride, BLOCK=ceilings.BLOCK, num_warps=8
    )
    assert sums.tolist() == [reads * sum(4.0**block for block in range(i, blocks, programs)) for i in range(programs)]
