"""What the machine can do: copying, reading what the L2 cache holds, multiplying matrices.

`gpu_evidence.py` runs this. It writes ceilings.json and ceilings.md.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import triton
import triton.language as tl
import typer
from torch import Tensor

from lowmem_optim.cli.timing import Step, Stopwatch, interleaved

MB = 10**6
#: Elements of a block, and how often each is read in a launch.
BLOCK, READS = 2048, 64


@triton.jit
def _read_kernel(x_ptr, sums_ptr, blocks, reads, stride, BLOCK: tl.constexpr):
    """One program reads so many blocks of x, ``stride`` apart and round and round, and writes their sum.

    Neighbours read neighbouring blocks at the same time, and a block comes again when all others have been read.
    """
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(reads):
        block = (program + i * stride) % blocks
        total += tl.load(x_ptr + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums_ptr + program, tl.sum(total))


def read_blocks(x: Tensor, sums: Tensor, blocks_each: int) -> None:
    """Let as many programs as there are sums read so many blocks of x each, in one launch.

    On a CPU a stand-in, which adds up as many elements of one block.
    """
    blocks, programs = x.numel() // BLOCK, sums.numel()
    if x.device.type == "cpu":
        sums.copy_(sum(x[:BLOCK].sum() for _ in range(blocks_each)))
        return
    _read_kernel[(programs,)](x, sums, blocks, blocks_each, programs, BLOCK=BLOCK, num_warps=8)


def median_seconds(step: Step, device: torch.device, rounds: int) -> float:
    """Return the median seconds of a step."""
    times = interleaved({"step": step}, rounds, Stopwatch(device), lambda _: None)["step"]
    return statistics.median(time.step for time in times)


def copy_rate(device: torch.device, nbytes: int, rounds: int) -> float:
    """Return bytes read and written in a second by a copy on the device."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), device, rounds)


def read_rate(device: torch.device, nbytes: int, rounds: int) -> float:
    """Return bytes read in a second out of so many that are read again and again."""
    # as many programs as the device has places for, so that all pass over x together
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    blocks = max(1, nbytes // 4 // BLOCK)
    x, sums = torch.ones(blocks * BLOCK, device=device), torch.zeros(programs, device=device)
    blocks_each = -(-READS * blocks // programs)
    seconds = median_seconds(lambda: read_blocks(x, sums, blocks_each), device, rounds)
    assert sums.tolist() == [blocks_each * BLOCK] * programs
    return 4 * BLOCK * blocks_each * programs / seconds


def matmul_rate(device: torch.device, size: int, rounds: int) -> float:
    """Return floating-point operations in a second of a bf16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=c), device, rounds)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny sizes on a CPU.")] = False,
) -> None:
    """Measure what bounds every kernel on this device."""
    device = torch.device("cpu" if dry_run else "cuda")
    rounds = 2 if dry_run else 20
    copied, size = (MB, 64) if dry_run else (4096 * MB, 8192)
    sets = (1,) if dry_run else (8, 16, 24, 32, 40, 48, 56, 64, 80)
    figures = {
        "copy_gb_per_s": copy_rate(device, copied, rounds) / 1e9,
        "bf16_matmul_tflop_per_s": matmul_rate(device, size, rounds) / 1e12,
        "read_gb_per_s_by_working_set_mb": {mb: read_rate(device, mb * MB, rounds) / 1e9 for mb in sets},
    }
    (out / "ceilings.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    lines = ["| | |", "|---|---|", f"| copy of {copied // MB} MB | {figures['copy_gb_per_s']:.0f} GB/s |"]
    lines += [f"| bf16 matrix product, {size} | {figures['bf16_matmul_tflop_per_s']:.1f} TFLOP/s |"]
    reads = figures["read_gb_per_s_by_working_set_mb"]
    assert isinstance(reads, dict)
    lines += [f"| reads of {mb} MB again and again | {rate:.0f} GB/s |" for mb, rate in reads.items()]
    text = "\n".join(lines) + "\n"
    (out / "ceilings.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
