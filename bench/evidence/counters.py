"""Bytes at DRAM and through L2 of each optimizer's step, by Nsight Compute's counters, against the formula.

`gpu_evidence.py` runs this. It needs ncu, the permission to read counters, `lowmem profile` and bench/nsight; without
one of them it says so and is skipped. It writes ncu-<optimizer>.csv, formula-<optimizer>.json, bytes-<optimizer>.json.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from running import REPO, skip

READER = REPO / "bench" / "nsight" / "kernel_bytes.py"
PROFILE = REPO / "python" / "lowmem_optim" / "cli" / "profile.py"
OPTIMIZERS = (
    *("AdaLomo", "Adafactor", "TorchAdafactor", "CAME", "SinkGD", "APOLLO", "APOLLOMini", "AdamW", "Lomo", "AdaPM"),
    *("AdamMini", "SWAN"),
)
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum"
#: Seconds for one optimizer, of which most go into starting ncu, and compiling.
SECONDS, TIMED_OUT = 60, 124


def ncu_command(ncu: str, name: str, out: Path) -> list[str]:
    """Return the command that profiles the step of an optimizer over a layer of Llama 7B."""
    lowmem = [sys.executable, "-c", "from lowmem_optim.cli import app; app()"]
    return [
        *(ncu, "--profile-from-start", "off", "--nvtx", "--metrics", METRICS),
        # caches as the kernel before has left them, and the device's own clocks
        *("--cache-control", "none", "--clock-control", "none", "--print-units", "base"),
        *("--page", "raw", "--csv", "--log-file", str(out / f"ncu-{name}.csv")),
        *(*lowmem, "profile", "--optimizer", name, "--model", "llama-7b", "--layers", "1", "--device", "cuda"),
        *("--formula", str(out / f"formula-{name}.json")),
    ]


def run(command: list[str]) -> tuple[int, str]:
    """Run a command; returns its exit code and what it printed, which is printed here too."""
    print(f"$ {shlex.join(command)}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"not done after {SECONDS} s"
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only says what would run.")] = False,
) -> None:
    """Count the bytes that optimizers' kernels move."""
    if dry_run:
        print(shlex.join(ncu_command("ncu", OPTIMIZERS[0], out)))
        skip("a dry run has no counters")
    ncu = shutil.which("ncu")
    if ncu is None:
        skip("ncu is not on PATH")
    for path in (READER, PROFILE):
        if not path.exists():
            skip(f"{path.relative_to(REPO)} is missing")
    lines = ["| optimizer | DRAM bytes for each element | times the formula |", "|---|---|---|"]
    failed = []
    for name in OPTIMIZERS:
        code, text = run(ncu_command(ncu, name, out))
        log = out / f"ncu-{name}.csv"
        if "ERR_NVGPUCTRPERM" in text + (log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""):
            skip("ncu may not read this device's counters (ERR_NVGPUCTRPERM)")
        result = out / f"bytes-{name}.json"
        formula = str(out / f"formula-{name}.json")
        reader = [sys.executable, str(READER), str(log), "--formula", formula, "--out", str(result)]
        if code or run(reader)[0]:
            failed.append(name)
            continue
        total = json.loads(result.read_text(encoding="utf-8"))[-1]
        ratio = total.get("times_least")
        lines.append(f"| {name} | {total['dram_per_element']:.2f} | {'' if ratio is None else f'{ratio:.3f}'} |")
        (out / "counters.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if failed:
        raise RuntimeError(f"no counters for {', '.join(failed)}; see above")


if __name__ == "__main__":
    typer.run(main)
