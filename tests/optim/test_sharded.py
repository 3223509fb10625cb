"""Sharded parameters in real processes (gloo): the numbers of a single process, and its checkpoints."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lowmem_optim import CAME
from optim.sharded import CHECKPOINTED, Model, carries_on, state_dicts
from optim.tensors import assert_same_bits

WORKER = Path(__file__).with_name("sharded_worker.py")
KILLED = Path(__file__).with_name("killed_worker.py")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "distributed.md"


def environment_of_tests():
    path = os.pathsep.join([str(WORKER.parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def started(processes, folder, worker):
    """What processes print, and the codes with which they end."""
    running = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(processes), str(folder)],
            env=environment_of_tests(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return "\n".join(outputs), [process.returncode for process in running]


def run(processes, folder):
    outputs, codes = started(processes, folder, WORKER)
    assert codes == [0] * processes, outputs


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_and_four_processes_equal_one(tmp_path):
    """One test, since four processes, and then this one, carry on from the checkpoints of two."""
    for processes in (2, 4):
        run(processes, tmp_path)
        table = (tmp_path / f"table-{processes}.md").read_text()
        print(table)
        assert table in PAGE.read_text(), f"docs/distributed.md has another table:\n{table}"

    for config in CHECKPOINTED:
        carries_on(config, tmp_path, None, None, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_process_killed_in_a_save_leaves_the_last_checkpoint(tmp_path):
    """What was being saved is no checkpoint, and the one before carries on with its bits."""
    outputs, codes = started(2, tmp_path, KILLED)
    assert codes[1] == -signal.SIGKILL, outputs
    assert codes[0] != 0, "the other process believes that the checkpoint is there"
    assert (tmp_path / "first" / ".metadata").exists()
    assert any((tmp_path / "second").iterdir())
    # by which the example tells what is complete
    assert not (tmp_path / "second" / ".metadata").exists()

    model = Model(None, None, fill=0.0)
    optimizer = CAME(model.named_parameters(), lr=1e-2)
    states = state_dicts(model, optimizer)
    with pytest.raises(CheckpointException, match="metadata"):
        dcp.load(states, checkpoint_id=tmp_path / "second", no_dist=True)
    dcp.load(states, checkpoint_id=tmp_path / "first", no_dist=True)
    model.load(optimizer, states)
    model.step(optimizer, 2)
    assert_same_bits(list(model.parameters()), torch.load(tmp_path / "third_step.pt"))
