"""A step of every optimizer over small odd shapes, in compute-sanitizer, which sees accesses outside of tensors.

`gpu_evidence.py` runs this, which runs itself in compute-sanitizer. Without that it says so and is skipped. Each tensor
is an allocation of its own, so that the next one does not hide what goes too far. It writes memcheck.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from running import REPO, skip

#: compute-sanitizer's exit code for errors that it has found.
FOUND = 9
#: Seconds after which no other optimizer is begun, and after which the sanitizer is ended.
SECONDS, MOST_SECONDS = 60.0, 85.0
#: SWAN, which multiplies matrices for seconds under the sanitizer, comes last.
LAST = "SWAN"


def check(device: str, end: float) -> None:
    """Take a step of each optimizer in bfloat16 over the shapes of the tests, and print its name; until ``end``."""
    # here rather than above, so that the process that starts the sanitizer need not wait for torch
    import torch
    from torch import nn

    from lowmem_kernels.testing.cases import SHAPES, make_tensors
    from lowmem_optim.cli.contenders import ours

    contenders = [each for each in ours([], torch.bfloat16) if "nearest" not in each.name]
    for contender in sorted(contenders, key=lambda each: each.name == LAST):
        if time.monotonic() > end:
            print(f"no time for {contender.name}", flush=True)
            continue
        tensors = [make_tensors(case, torch.bfloat16, i, device=device) for i, case in enumerate(SHAPES)]
        params = [nn.Parameter(value) for value, _ in tensors]
        for param, (_, grad) in zip(params, tensors, strict=True):
            param.grad = grad
        contender.make(params).step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"done: {contender.name}", flush=True)


def memcheck_command(sanitizer: str, out: Path) -> list[str]:
    """Return the command that takes the steps in the sanitizer."""
    own = [sys.executable, __file__, "--inside", "--out", str(out)]
    return [sanitizer, "--tool", "memcheck", "--error-exitcode", str(FOUND), *own]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    inside: Annotated[bool, typer.Option("--inside", help="Take the steps; without it, run that.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only says what would run.")] = False,
) -> None:
    """Look for accesses outside of tensors."""
    if inside:
        check("cuda", time.monotonic() + SECONDS)
        return
    if dry_run:
        print(shlex.join(memcheck_command("compute-sanitizer", out)))
        skip("a dry run has no accesses on a GPU")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        skip("compute-sanitizer is not on PATH")
    done = subprocess.run(
        memcheck_command(sanitizer, out),
        cwd=REPO,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    print(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("done: ", "no time for ", "=====", "Error"))]
    (out / "memcheck.md").write_text("```\n" + "\n".join(lines) + "\n```\n", encoding="utf-8")
    if done.returncode:
        raise RuntimeError("compute-sanitizer has found errors" if done.returncode == FOUND else "the steps failed")


if __name__ == "__main__":
    typer.run(main)
