"""The tests that need a GPU, shared out among processes: most of their time is compiling, which takes the host.

`gpu_evidence.py` runs this. It writes tests.json, tests.md and a log for each process. Exits with 1 unless all pass.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

REPO = Path(__file__).parent.parent.parent
#: Random launches of tests/gpu/test_tickets.py.
LAUNCHES = 10_000
#: Tests that time something run when all others are done.
TIMED = "tests/gpu/test_bench.py"
#: At a time; each has some 500 MB on the device for itself.
MOST_PROCESSES = 12
#: Seconds for all, and of them for those that time something.
SECONDS, SECONDS_TIMED = 270.0, 40.0
OUTCOME = re.compile(r"^(\S+?::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def pytest_command(*arguments: str) -> list[str]:
    """Return a command; without pytest-timeout the project's options name one that pytest does not know."""
    options = [] if find_spec("pytest_timeout") else ["-o", "addopts=--import-mode=importlib"]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *arguments]


def collected(folder: str) -> list[str]:
    """Return the ids of all tests in a folder or file."""
    command = pytest_command("--collect-only", "-q", folder)
    found = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    if found.returncode or not ids:
        raise RuntimeError(f"collecting {folder} failed:\n{found.stdout}{found.stderr}")
    return ids


def run(shards: Sequence[Sequence[str]], out: Path, seconds: float, first: int = 0) -> dict[str, str]:
    """Run each shard in a process; returns the outcome of every test, "unfinished" after so many seconds."""
    end = time.monotonic() + seconds
    environment = {**os.environ, "LOWMEM_TICKET_LAUNCHES": os.environ.get("LOWMEM_TICKET_LAUNCHES", str(LAUNCHES))}
    running = []
    for i, ids in enumerate(shards, first):
        log = out / f"tests-{i}.log"
        command = pytest_command("-v", "--no-header", "--color=no", "--durations=10", *ids)
        with log.open("w", encoding="utf-8") as file:
            running.append(
                (subprocess.Popen(command, cwd=REPO, env=environment, stdout=file, stderr=subprocess.STDOUT), log)
            )
    outcomes = dict.fromkeys((name for ids in shards for name in ids), "unfinished")
    for process, log in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        found = {name: outcome.lower() for name, outcome in OUTCOME.findall(log.read_text(encoding="utf-8"))}
        outcomes.update((name, outcome) for name, outcome in found.items() if name in outcomes)
    return outcomes


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Some tests that need no GPU instead.")] = False,
) -> None:
    """Run all tests that are marked gpu."""
    ids = collected("tests/spec/test_tickets.py" if dry_run else "tests/gpu")
    timed = [name for name in ids if name.startswith(TIMED)]
    others = [name for name in ids if name not in timed]
    count = min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) - 2), len(others))
    outcomes = run([others[i::count] for i in range(count)], out, SECONDS - SECONDS_TIMED)
    if timed:
        outcomes |= run([timed], out, SECONDS_TIMED, first=count)
    (out / "tests.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    counts = {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))}
    bad = [f"- {kind}: `{name}`" for name, kind in outcomes.items() if kind not in ("passed", "skipped", "xfail")]
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    (out / "tests.md").write_text("\n".join([summary, "", *bad]) + "\n", encoding="utf-8")
    print("\n".join([*bad, summary]))
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
