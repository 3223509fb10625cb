"""How a section says that it cannot run here."""

from __future__ import annotations

from typing import NoReturn

import typer

#: Exit code of such a section; the last line that it has printed says why.
SKIPPED = 77


def skip(reason: str) -> NoReturn:
    """Say why this cannot run here, and end."""
    print(reason)
    raise typer.Exit(SKIPPED)
