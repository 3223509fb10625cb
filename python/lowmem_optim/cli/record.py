"""The record of a comparison, in JSON: all that is needed to repeat it and to draw it anew."""

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lowmem_kernels
from lowmem_optim.cli.data import Text
from lowmem_optim.cli.files import json_of, write_whole
from lowmem_optim.cli.loop import TrainConfig
from lowmem_optim.cli.report import figures
from lowmem_optim.cli.run import Run


def write_record(path: Path, config: TrainConfig, text: Text, runs: list[Run]) -> None:
    """Writes the configuration, the environment, the text's origin, and each run's curves and figures."""
    record = {
        "config": asdict(config),
        "environment": environment(config.device),
        "text": {
            "source": text.source,
            "files": text.files,
            "training_bytes": len(text.training),
            "validation_bytes": len(text.validation),
        },
        "interrupted": any(run.status == "interrupted" for run in runs),
        "diverged": [run.label for run in runs if run.status == "diverged"],
        "wall_seconds": sum(run.wall_seconds for run in runs),
        "runs": [asdict(run) | {"figures": figures(run, runs[0])} for run in runs],
    }
    # the value of an --opt may be any Python literal, such as an infinity, a set or a complex number
    write_whole(path, json_of(record))


def environment(device: str) -> dict[str, Any]:
    """Versions, the device's name, and the commit of the package's source where it runs from a checkout."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "lowmem_kernels": lowmem_kernels.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "git_commit": _commit(),
    }


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an architecture that names its processor otherwise
        return platform.machine()


def _commit() -> str | None:
    """The checked-out commit that contains this file; None for an installed package, even inside a checkout."""
    here = Path(__file__)
    command = ["git", "rev-parse", "HEAD", f"HEAD:./{here.name}"]  # the second fails unless git tracks the file
    try:
        found = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.split()[0]
