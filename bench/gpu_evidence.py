"""Everything that is to be known about the kernels on a GPU, each call one folder and under nine minutes.

    python bench/gpu_evidence.py                       # bench/results/gpu-<device>-<date>
    python bench/gpu_evidence.py --only headline       # training of Llama 7B: gpu-<device>-<date>-headline
    python bench/gpu_evidence.py --only training       # a short real training: gpu-<device>-<date>-training
    python bench/gpu_evidence.py --dry-run --out DIR   # all of it on a CPU in tiny sizes: does it work?

Each section is a process of its own with a time limit, so that what crashes, hangs or takes all memory stops nothing
else. See docs/gpu-evidence.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from evidence.running import EVIDENCE, REPO, Outcome, Section, run_section, shown

#: Seconds for all sections; what has not begun by then is left out.
TOTAL_SECONDS = 530.0
NOT_IN_A_DRY_RUN = ("compile", "bench-gpt2", "bench-llama-1b", "bench-layer")
#: Seconds for what takes a call of its own, and of them for its own work.
ALONE_SECONDS, WORK_SECONDS = 525.0, 505.0
#: With less time left than this a section is not begun.
LEAST_SECONDS = 5.0


def sections(out: Path, dry_run: bool) -> list[Section]:
    """Return all sections, those first without which the others mean little."""

    def script(name: str, *arguments: object) -> tuple[str, ...]:
        dry = ("--dry-run",) if dry_run else ()
        return (sys.executable, str(EVIDENCE / f"{name}.py"), "--out", str(out), *dry, *map(str, arguments))

    benched = [
        ("gpt2", "GPT-2"),
        ("llama-1b", "Llama 1B"),
        ("llama-7b", "Llama 7B, ours and torch's fused AdamW", "--one-by-one"),
    ]
    layer = ("--model", "llama-1b", "--layers", "1")
    work = ("--seconds", WORK_SECONDS)
    tiny = ("--steps", "2", "--layers", "1", "-o", "Lomo") if dry_run else ()
    host = (sys.executable, str(REPO / "bench" / "host_cost.py"), "--out", str(out / "host_cost.json"), *tiny)
    found = [
        Section("tests", "tests marked gpu, 10000 random launches of the ticket form", script("gpu_tests"), 280),
        Section("ceilings", "copy, reads that hit L2, bf16 matrix product", script("ceilings"), 40),
        Section("compile", "kernels that are timed below, on all cores", script("compile_kernels"), 75),
        Section("orders", "one launch against one for each phase; orders of tickets", script("orders"), 75),
        *(
            Section(f"bench-{model}", f"lowmem bench, {what}", script("model_bench", "--model", model, *how), 60)
            for model, what, *how in benched
        ),
        Section("counters", "bytes at DRAM by Nsight Compute, against the formula", script("counters"), 90),
        Section("memcheck", "every optimizer's step over odd shapes, in compute-sanitizer", script("memcheck"), 90),
        # torch.compile takes five seconds for each tensor, so this is the one place where Adafactor is compiled
        Section("bench-layer", "lowmem bench, a layer of Llama 1B", script("model_bench", *layer), 120),
        Section("host", "host time of a step over 291 tensors, by a driver that launches nothing", host, 75),
        Section(
            "headline", "training of Llama 7B: what fits, how fast", script("headline", *work), ALONE_SECONDS, True
        ),
        Section("training", "60M parameters on real text", script("training", *work), ALONE_SECONDS, True),
    ]
    # on a CPU there is nothing to compile, and models differ in nothing
    return [section for section in found if not (dry_run and section.name in NOT_IN_A_DRY_RUN)]


def run_all(
    chosen: Sequence[Section], out: Path, total: float, say: Callable[[str], object], together: int = 1
) -> list[Outcome]:
    """Run sections, one after the other unless times mean nothing, and write the summary after each."""
    out.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + total, list[Outcome]()

    def run(section: Section) -> Outcome:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            reason = f"no time left of {total:.0f} s"
            return Outcome(section.name, section.what, "skipped", reason, 0.0, shown(section.command))
        return run_section(section, out, min(section.seconds, left))

    with ThreadPoolExecutor(together) as pool:
        about = pool.submit(circumstances)
        for outcome in pool.map(run, chosen):
            say(f"{outcome.name}: {outcome.status} in {outcome.seconds} s  {outcome.reason}")
            outcomes.append(outcome)
            write_summary(out, outcomes, about.result())
    return outcomes


def circumstances() -> dict[str, Any]:
    """Return the device, its driver, versions, the commit, and whether files were changed since."""
    from lowmem_optim.cli.record import environment as versions

    found = versions("cuda" if torch.cuda.is_available() else "cpu")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shown([sys.executable, *sys.argv]),
        **found,
        "cuda": torch.version.cuda,
        "gpu": printed(query),
        "changed_files": printed(["git", "status", "--short", "--untracked-files=no"]),
    }


def printed(command: Sequence[str]) -> str | None:
    """Return what a command prints; None where it cannot run."""
    try:
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_summary(out: Path, outcomes: Sequence[Outcome], about: dict[str, Any]) -> None:
    """Write summary.md for readers and summary.json for programs."""
    record = {"circumstances": about, "sections": [asdict(outcome) for outcome in outcomes]}
    (out / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    counts = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "skipped")}
    lines = [
        "# Evidence from " + about["device"],
        "",
        ", ".join(f"{count} {status}" for status, count in counts.items()) + ". Each section's output is in its log.",
        "",
        "| section | what | status | seconds | why |",
        "|---|---|---|---|---|",
        *(f"| [{o.name}]({o.name}.log) | {o.what} | {o.status} | {o.seconds} | {cell(o.reason)} |" for o in outcomes),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {cell(str(value))} |" for key, value in about.items()),
        "",
        "```",
        *(outcome.command for outcome in outcomes),
        "```",
    ]
    for outcome in outcomes:
        report = out / f"{outcome.name}.md"
        if report.exists():
            lines += ["", f"## {outcome.name}", "", report.read_text(encoding="utf-8").strip()]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cell(text: str) -> str:
    """Return a text that does not end a cell of a table."""
    return text.replace("|", "\\|").replace("\n", "; ")[:300]


def default_folder(dry_run: bool, only: Sequence[str] = ()) -> Path:
    """Return the folder for this device, day and choice of sections."""
    if dry_run or not torch.cuda.is_available():
        return REPO / "runs" / "gpu-evidence-dry-run"
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return REPO / "bench" / "results" / "-".join(["gpu", device, f"{datetime.now(timezone.utc):%Y-%m-%d}", *only])


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for all results.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this section. Repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything in tiny sizes on a CPU.")] = False,
    seconds: Annotated[float, typer.Option(help="For all sections together.", min=1)] = TOTAL_SECONDS,
) -> None:
    """Run the tests and measurements that need a GPU, and write what came of them into one folder."""
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here; --dry-run tries everything on a CPU")
    folder = (out or default_folder(dry_run, only or ())).resolve()
    chosen = sections(folder, dry_run)
    names = [section.name for section in chosen]
    if unknown := set(only or ()) - set(names):
        raise typer.BadParameter(f"{sorted(unknown)[0]!r} is not a section; allowed: {', '.join(names)}")
    # a dry run has time for everything
    wanted = only or [section.name for section in chosen if dry_run or not section.alone]
    chosen = [section for section in chosen if section.name in wanted]
    outcomes = run_all(chosen, folder, seconds, print, together=2 if dry_run else 1)
    print(folder / "summary.md")
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
