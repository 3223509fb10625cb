"""Sections as processes with time limits: whatever goes wrong is an outcome and stops nothing else."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer

REPO = Path(__file__).parent.parent.parent
EVIDENCE = REPO / "bench" / "evidence"
#: Exit code of a section that cannot run here; the last line that it has printed says why.
SKIPPED = 77


@dataclass(frozen=True)
class Section:
    """A command whose output goes to ``<name>.log`` and whose files go to the folder, and the seconds it may take.

    alone: whether it takes a call of its own, and so runs only where it is named.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a section ended: "passed", "failed" or "skipped", why if it did not pass, and the seconds it took."""

    name: str
    what: str
    status: str
    reason: str
    seconds: float
    command: str


def run_section(
    section: Section, out: Path, seconds: float, *, inside: bool = False, grace: float | None = None
) -> Outcome:
    """Run a section for so many seconds at most; whatever goes wrong is an outcome.

    inside: of another section, which is ended with all that it has started.
    grace: seconds that it has to end by itself after SIGTERM; None: it is ended at once.
    """
    log = out / f"{section.name}.log"
    command = shown(section.command)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {command}\n")
        file.flush()
        # a session of its own, so that all of its processes can be ended
        process = subprocess.Popen(
            section.command,
            cwd=REPO,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=not inside,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            if grace is not None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        finally:
            process.kill() if inside else end_session(process)
            process.wait()
    took = time.monotonic() - start
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip()
    if code == 0:
        status, reason = "passed", ""
    elif code is None:
        status, reason = "failed", f"not done after {seconds:.0f} s"
    else:
        status, reason = ("skipped", last) if code == SKIPPED else ("failed", f"exit code {code}: {last}")
    return Outcome(section.name, section.what, status, reason, round(took, 1), command)


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it in the checkout, wherever that is."""
    here = ["python" if word == sys.executable else word.removeprefix(f"{REPO}{os.sep}") for word in command]
    return shlex.join(here)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process, and those it has started, unless all are gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Return the environment of sections: the checkout's packages, installed or not, and what scripts share."""
    paths = [str(REPO), str(REPO / "python"), str(REPO / "bench"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def skip(reason: str) -> NoReturn:
    """Say why a section cannot run here, and end."""
    print(reason)
    raise typer.Exit(SKIPPED)
