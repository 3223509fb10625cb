"""Gradients are averaged over processes before they are used: two processes, gloo."""

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("replicas_worker.py")


def test_two_processes(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
