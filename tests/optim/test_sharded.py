"""Sharded parameters in real processes (gloo): the numbers of a single process, and its checkpoints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from optim.sharded import CHECKPOINTED, Model, state_dicts
from optim.tensors import assert_same_bits

WORKER = Path(__file__).with_name("sharded_worker.py")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "distributed.md"


def environment_of_tests():
    path = os.pathsep.join([str(WORKER.parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(processes, folder):
    environment = environment_of_tests()
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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_and_four_processes_equal_one(tmp_path):
    """One test, since four processes, and then this one, carry on from the checkpoints of two."""
    for processes in (2, 4):
        run(processes, tmp_path)
        table = (tmp_path / f"table-{processes}.md").read_text()
        print(table)
        assert table in PAGE.read_text(), f"docs/distributed.md has another table:\n{table}"

    for config in CHECKPOINTED:
        model = Model(None, None, fill=0.0)
        optimizer = config.make(model.named_parameters())
        states = state_dicts(model, optimizer)
        dcp.load(states, checkpoint_id=tmp_path / config.name, no_dist=True)
        model.load(optimizer, states)
        for step in range(3, 6):
            model.step(optimizer, step)
        assert_same_bits(list(model.parameters()), torch.load(tmp_path / f"{config.name}.pt"))


def test_the_example_learns_and_carries_on(tmp_path):
    """By torchrun, and then one process alone."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    losses = []
    for launcher, variables in ((torchrun, {}), ([], alone)):
        done = subprocess.run(
            [sys.executable, *launcher, str(ROOT / "examples" / "fsdp2_train.py"), str(tmp_path)],
            env={**environment_of_tests(), **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses += [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[0] > 2
    # where it has left off, and better
    assert losses[1] < 0.5
    assert losses[2] < 0.5
    assert losses[3] < 0.15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "200"]
