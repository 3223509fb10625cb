"""What `lowmem doctor` finds of known optimizers: the tables of docs/doctor.md, and all verdicts as JSON.

python bench/doctor_profile.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import lowmem_kernels
from lowmem_optim.cli.record import installed
from lowmem_optim.cli.registry import choices
from lowmem_optim.conformance import PROBES, Subject, Verdict, examine, load_subject

ROOT = Path(__file__).parents[1]
PACKAGES = ("lowmem-kernels", "torch", "transformers", "came-pytorch", "lomo-optim", "numpy")
#: Names in the table, module:Class, and arguments.
PEERS: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    ("torch AdamW, fused", "torch.optim:AdamW", {"fused": True}),
    ("torch AdamW, foreach", "torch.optim:AdamW", {"foreach": True}),
    ("torch Adam", "torch.optim:Adam", {}),
    ("torch SGD", "torch.optim:SGD", {}),
    ("torch Adafactor", "torch.optim:Adafactor", {}),
    ("torch Adafactor, foreach", "torch.optim:Adafactor", {"foreach": True}),
    ("transformers Adafactor", "transformers:Adafactor", {}),
    ("came-pytorch CAME", "came_pytorch:CAME", {}),
    ("lomo-optim Lomo", "lomo_optim:Lomo", {}),
    ("lomo-optim AdaLomo", "lomo_optim:AdaLomo", {}),
)
#: Of the probes, those in which optimizers differ; what else is wrong is in a column of its own.
COLUMNS = (
    "rule",
    "weight decay",
    "place of eps",
    "NaN gradient",
    "bfloat16 updates",
    "state of bfloat16",
    "load_state_dict",
    "resuming",
)
BEGIN, END = "<!-- profile: bench/doctor_profile.py -->", "<!-- end of profile -->"


def table(found: Mapping[str, Sequence[Verdict]]) -> Iterable[str]:
    """Lines of Markdown, one for each optimizer."""
    yield f"| optimizer | {' | '.join(COLUMNS)} | else wrong |"
    yield "|" + "---|" * (len(COLUMNS) + 2)
    for name, verdicts in found.items():
        by_probe = {verdict.probe: verdict for verdict in verdicts}
        cells = [_cell(by_probe[probe]) for probe in COLUMNS]
        rest = [each for each in verdicts if each.wrong and each.probe not in COLUMNS]
        yield f"| {name} | {' | '.join(cells)} | {'; '.join(f'{each.probe}: {each.finding}' for each in rest)} |"


def _cell(verdict: Verdict) -> str:
    return f"**{verdict.finding}**" if verdict.wrong else verdict.finding


def main(
    out: Annotated[Path, typer.Option(help="JSON file for all verdicts.")] = ROOT / "bench/results/doctor_profile.json",
    page: Annotated[Path, typer.Option(help="Page whose tables are replaced.")] = ROOT / "docs/doctor.md",
) -> None:
    """Examine all of them on the CPU, with one thread."""
    torch.set_num_threads(1)
    subjects = {name: Subject(name, load_subject(of).cls, options) for name, of, options in PEERS}
    own = {each.name: Subject(each.name, each.cls) for each in choices().values() if each.can_fuse}
    found = {name: list(examine(subject)) for name, subject in {**subjects, **dict(sorted(own.items()))}.items()}
    date = datetime.now(timezone.utc).date().isoformat()
    versions = {package: installed(package) for package in PACKAGES} | {"lowmem-kernels": lowmem_kernels.__version__}
    said = ", ".join(f"{package} {version}" for package, version in versions.items())
    verdicts = {name: [vars(verdict) for verdict in of] for name, of in found.items()}
    out.write_text(json.dumps({"date": date, "versions": versions, "verdicts": verdicts}, indent=1) + "\n")
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = [
        f"{date}, on a CPU: {said}. {len(PROBES)} probes each; **bold** is wrong.",
        "",
        *table({name: found[name] for name in subjects}),
        "",
        *table({name: found[name] for name in sorted(own)}),
    ]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    typer.run(main)
