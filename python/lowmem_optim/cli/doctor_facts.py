"""What `lowmem doctor` says of the machine: versions, devices, the backend and why, environment variables."""

import os
import platform
import shutil
import subprocess
from typing import Any

import numpy
import torch

from lowmem_kernels.device import device_facts
from lowmem_kernels.dispatch import choose, interpreting, why_not_triton
from lowmem_optim.cli.record import environment, installed

#: Those that decide what runs, and what they do.
VARIABLES = {
    "LOWMEM_BACKEND": "replaces the backend 'auto'",
    "TRITON_INTERPRET": "kernels run in Triton's interpreter, on the CPU",
    "CUDA_VISIBLE_DEVICES": "which NVIDIA GPUs there are",
    "HIP_VISIBLE_DEVICES": "which AMD GPUs there are",
}


def facts(device: str) -> dict[str, Any]:
    """All facts, for JSON; of the backend those on ``device``."""
    around = environment(device)
    return {
        "versions": {
            "lowmem-kernels": around["lowmem_kernels"],
            "commit": around["git_commit"],
            "Python": around["python"],
            "torch": around["torch"],
            "Triton": around["triton"],
            "NumPy": numpy.__version__,
            "transformers": installed("transformers"),
            "system": platform.platform(),
            "CUDA": torch.version.cuda,
            "ROCm": torch.version.hip,
            "NVIDIA driver": _driver(),
        },
        "devices": [_device(name) for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))],
        "backend": dict(zip(("name", "why"), backend(device), strict=True)),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def backend(device: str) -> tuple[str, str]:
    """What "auto" is on this device, and the reason as a sentence; "none" where it is an error."""
    tensors = [torch.empty(1, device=device)]
    try:
        chosen = choose("auto", tensors)
    except (ValueError, RuntimeError) as error:
        return "none", str(error)
    if "LOWMEM_BACKEND" in os.environ:
        return chosen, f"The environment variable LOWMEM_BACKEND is {os.environ['LOWMEM_BACKEND']!r}."
    if chosen == "triton":
        return chosen, f"The tensors are on {device}, a GPU, and Triton is installed."
    reason = why_not_triton(tensors)
    if reason is None:  # in the interpreter
        return chosen, "The tensors are on the CPU, where 'auto' is torch also if TRITON_INTERPRET is set."
    return chosen, reason[0].upper() + reason[1:]


def _device(name: str) -> dict[str, Any]:
    if name == "cpu":
        shown = environment(name)
        assumed = device_facts(torch.device(name)).name
        return {
            "device": name,
            "name": shown["device"],
            "threads": shown["threads"],
            "note": f"kernels are {'interpreted' if interpreting() else 'not run'} here; plans are those of {assumed}",
        }
    found, properties = device_facts(torch.device(name)), torch.cuda.get_device_properties(name)
    return {
        "device": name,
        "name": found.name,
        "architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
        "SMs": found.sm_count,
        "L2, MiB": round(found.l2_bytes / 2**20, 1),
        "memory, GiB": round(properties.total_memory / 2**30, 1),
        "warp": found.warp_size,
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, from its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.stdout.split()), None)
