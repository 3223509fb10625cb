"""Sharded parameters in real processes (gloo): the numbers of a single process, and its checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from lowmem_optim import AdamW
from optim.sharded import Model, state_dicts
from optim.tensors import assert_same_bits

WORKER = Path(__file__).with_name("sharded_worker.py")
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def run(processes, folder):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(processes), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)


def test_two_and_four_processes_equal_one(tmp_path):
    """One test, since four processes, and then this one, carry on from the checkpoint of two."""
    for processes in (2, 4):
        run(processes, tmp_path)
        table = (tmp_path / f"table-{processes}.md").read_text()
        print(table)
        assert table in PAGE.read_text(), f"docs/distributed.md has another table:\n{table}"

    model = Model(None, None, fill=0.0)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, seed=3, state_dtype="param")
    states = state_dicts(model, optimizer)
    dcp.load(states, checkpoint_id=tmp_path / "checkpoint")
    model.load(optimizer, states)
    for step in range(3, 6):
        model.step(optimizer, step)
    assert_same_bits(list(model.parameters()), torch.load(tmp_path / "ends.pt"))
