"""Tables and JSON of `lowmem doctor`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowmem_optim.cli.doctor_facts import VARIABLES
from lowmem_optim.conformance import Check, Verdict

WIDTH = 120


def wide(console: Console) -> Console:
    """At least so wide that no table loses a column."""
    return Console(file=console.file, width=max(console.width, WIDTH))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show_facts(console: Console, facts: dict[str, Any]) -> None:
    """Prints versions, devices, the backend and variables."""
    table = _table("what", "here")
    for name, version in facts["versions"].items():
        table.add_row(name, "-" if version is None else version)
    for device in facts["devices"]:
        said = [f"{key} {value}" for key, value in device.items() if key not in ("device", "name", "note")]
        said += [device["note"]] if "note" in device else []
        table.add_row(device["device"], f"{device['name']}: {', '.join(said)}")
    for name, meaning in VARIABLES.items():
        value = facts["variables"][name]
        table.add_row(name, f"not set ({meaning})" if value is None else f"{value} ({meaning})")
    console.print(table)
    backend = facts["backend"]
    console.print(f"backend='auto' is {backend['name']}: {backend['why']}", highlight=False, markup=False)


def show_checks(console: Console, how: str, checks: Sequence[Check]) -> None:
    """Prints the self-check."""
    console.print(f"\n{how}", highlight=False, markup=False)
    table = _table("optimizer", "dtype", "of the tolerance", "largest at", "")
    for check in checks:
        result = "ok" if check.ok else "[bold red]failed[/]"
        table.add_row(
            check.optimizer,
            check.dtype,
            "-" if check.error else f"{check.times:.2g}",
            escape(check.error or check.where),
            result,
        )
    console.print(table)


def show_verdicts(console: Console, title: str, verdicts: Sequence[Verdict]) -> None:
    """Prints what the probes found of an optimizer."""
    console.print(f"\n{title}", highlight=False, markup=False)
    table = _table("probe", "", "what it does")
    for verdict in verdicts:
        table.add_row(verdict.probe, "[bold red]wrong[/]" if verdict.wrong else "", escape(verdict.sentence))
    console.print(table)


def checks_for_json(how: str, checks: Sequence[Check]) -> dict[str, Any]:
    """The part of the self-check."""
    return {"how": how, "checks": [{**asdict(check), "ok": check.ok} for check in checks]}
