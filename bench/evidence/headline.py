"""Training Llama 7B with each optimizer, ordinary and fused: peak memory, tokens a second, largest batch, and the plan.

`gpu_evidence.py` runs this. Each configuration is a process of its own with its share of the time, so that one that
does not fit, crashes or hangs ends nothing else. It writes headline.json, headline.csv, headline.md and headline.png,
after each configuration, and headline/ with logs and records.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from headline_plot import draw
from running import EVIDENCE, Section, run_section, skip

from lowmem_kernels.testing.models import MODELS, Architecture
from lowmem_optim.cli import registry
from lowmem_optim.cli.files import make_folder, write_whole
from lowmem_optim.cli.plan_memory import PARTS, Setting, plan
from lowmem_optim.cli.plan_model import Model, module_of, sizes_of
from lowmem_optim.cli.plan_report import size_of
from lowmem_optim.cli.record import environment

#: Seconds that a configuration may take beyond its share, which only says when no larger batch is tried.
LATE = 20.0
#: With less time left a configuration is not begun: importing and building a model take as long.
LEAST_SECONDS = 15.0


@dataclass(frozen=True)
class Configuration:
    """An optimizer with its arguments, and whether it updates inside the backward pass.

    live_options: arguments that only the live optimizer gets, not the planned one on the meta device.
    """

    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    fused: bool = False
    live_options: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """As in `lowmem plan`."""
        return "fused" if self.fused else "ordinary"

    @property
    def title(self) -> str:
        """Name and mode."""
        return f"{self.name}, {self.mode}"


#: Name, optimizer, arguments: those with the least state first.
OURS: list[tuple[str, str, dict[str, Any]]] = [
    ("Lomo", "Lomo", {}),
    ("AdaLomo", "AdaLomo", {}),
    ("APOLLOMini", "APOLLOMini", {}),
    ("APOLLO", "APOLLO", {}),
    ("SinkGD, Adafactor for the rest", "SinkGD", {"fallback": "adafactor"}),
    ("SinkGD, AdamW for the rest", "SinkGD", {"fallback": "adamw"}),
    ("AdamW, bf16 states", "AdamW", {"state_dtype": "param"}),
    ("AdamW, fp32 states", "AdamW", {"state_dtype": "fp32"}),
]
#: What one would use instead; its state is in the parameters' dtype.
TORCHS = Configuration("torch.AdamW(fused), bf16 states", "torch.AdamW", live_options={"fused": True})
CONFIGURATIONS = [TORCHS, *(Configuration(*each, fused=fused) for each in OURS for fused in (True, False))]
#: A few sequences of it fit into DRY_MEMORY.
DRY_CONFIGURATIONS = [Configuration(*OURS[1], fused=True)]
DRY_ARCHITECTURE, DRY_SEQUENCE, DRY_MEMORY = Architecture(64, 64, 176, 2, 4, 4), 32, 800_000


def configuration_of(architecture: Architecture) -> dict[str, Any]:
    """Return what transformers makes a Llama from."""
    return {
        "model_type": "llama",
        "vocab_size": architecture.vocab,
        "hidden_size": architecture.hidden,
        "intermediate_size": architecture.intermediate,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "tie_word_embeddings": False,
    }


def model_of(architecture: Architecture) -> Model:
    """Return the same for `lowmem plan`."""
    return Model("llama", module_of(architecture.shapes()).to(torch.bfloat16), sizes_of(architecture))


def planned(model: Model, configuration: Configuration, sequence: int) -> dict[str, Any]:
    """Return the bytes that `lowmem plan` says of one sequence, and their sum."""
    setting = Setting(torch.bfloat16, 1, sequence, True)
    rows = plan(model, [registry.find(configuration.optimizer)], configuration.options, setting)
    row = next(row for row in rows if row.mode == configuration.mode)
    return {f"planned_{part}": getattr(row, part) for part in (*PARTS[:-1], "total")}


def run_one(
    configuration: Configuration, model: Path, out: Path, plan: dict[str, Any], seconds: float, *options: str
) -> dict[str, Any]:
    """Measure a configuration in a process of its own; returns what became of it, with whatever was known by then."""
    record = out / f"{configuration.title.replace(', ', '-').replace(' ', '-')}.json"
    arguments = [
        *("--model", model, "--out", record, "--optimizer", configuration.optimizer),
        *("--options", json.dumps({**configuration.options, **configuration.live_options})),
        *("--until", time.time() + seconds, "--sequence-bytes", plan["planned_activations"]),
        *(["--fused"] if configuration.fused else []),
        *options,
    ]
    command = (sys.executable, str(EVIDENCE / "headline_run.py"), *map(str, arguments))
    outcome = run_section(Section(record.stem, configuration.title, command, 0), out, seconds + LATE, inside=True)
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if outcome.status != "passed":
        # what it had measured before stays
        found |= {"status": "failed", "reason": outcome.reason}
    return found | {"seconds": outcome.seconds}


def flat(configuration: Configuration, plan: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table: the plan, and what was measured, None where it was not."""
    one, largest = found.get("one") or {}, found.get("largest") or {}
    step, own = one.get("step_ms"), one.get("optimizer_ms")
    return {
        "optimizer": configuration.name,
        "mode": configuration.mode,
        "status": found["status"],
        "reason": found.get("reason", ""),
        **plan,
        **{name: found.get(name) for name in ("parameters", "gradients", "state", "free_bytes")},
        **{name: one.get(name) for name in ("peak_bytes", "reserved_bytes", "step_ms", "optimizer_ms")},
        "optimizer_share": own / step if step and own is not None else None,
        "tokens_per_s": one.get("tokens_per_s"),
        "largest_batch": largest.get("batch"),
        "least_too_many": found.get("least_too_many"),
        **{
            f"largest_{name}": largest.get(name) for name in ("peak_bytes", "reserved_bytes", "step_ms", "tokens_per_s")
        },
        "seconds": found.get("seconds"),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table for readers: GB are 1e9 bytes."""

    def form(value: float | None, pattern: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit if unit != 1.0 else value, pattern)

    lines = [
        "| optimizer | step | GB at the peak | planned | tokens/s | optimizer's share "
        "| largest batch | tokens/s with it |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        largest = form(row["largest_batch"], "d")
        if largest and row["least_too_many"] != row["largest_batch"] + 1:
            largest = f"at least {largest}"
        peak = form(row["peak_bytes"], ".2f", 1e9)
        if row["status"] != "ran":
            peak = f"{peak} {row['status']}{row['reason'] and ': ' + row['reason'].replace('|', ' ')[:200]}".strip()
        cells = (
            *(row["optimizer"], row["mode"], peak, form(row["planned_total"], ".2f", 1e9)),
            *(form(row["tokens_per_s"], ",.0f"), form(row["optimizer_share"], ".1%"), largest),
            form(row["largest_tokens_per_s"], ",.0f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        "One sequence unless said otherwise; bytes of tensors at the peak, the plan's sum beside it. The optimizer's "
        "share of a fused step is what it takes longer than a backward pass that only frees gradients."
    )
    return "\n".join([*lines, "", note]) + "\n"


def write(out: Path, rows: Sequence[dict[str, Any]], circumstances: dict[str, Any]) -> None:
    """Write all results so far."""
    write_whole(out / "headline.json", json.dumps({**circumstances, "rows": rows}, indent=1) + "\n")
    with (out / "headline.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (out / "headline.md").write_text(table(rows), encoding="utf-8")
    draw(out / "headline.png", rows, circumstances["title"])


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    layers: Annotated[int, typer.Option(help="Layers of Llama 7B, which has 32.", min=1, max=32)] = 32,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 2048,
    memory: Annotated[str | None, typer.Option(help="To do with, instead of all, as in 24GB.")] = None,
    seconds: Annotated[float, typer.Option(help="For all configurations together.", min=1)] = 505.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="A tiny model on a CPU instead.")] = False,
) -> None:
    """Measure all configurations, each with an equal share of the time that is left."""
    end = time.monotonic() + seconds
    if find_spec("transformers") is None:
        skip("transformers is not installed")
    # with segments that grow, memory is full before it has gaps
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    configurations, architecture, device = CONFIGURATIONS, MODELS["llama-7b"], "cuda"
    limit = None if memory is None else size_of(memory)
    if dry_run:
        configurations, architecture, device = DRY_CONFIGURATIONS, DRY_ARCHITECTURE, "cpu"
        layers, sequence, limit = architecture.layers, DRY_SEQUENCE, limit or DRY_MEMORY
    architecture = replace(architecture, layers=layers)
    folder = make_folder(out / "headline")
    file = folder / "config.json"
    write_whole(file, json.dumps(configuration_of(architecture), indent=1) + "\n")
    model = model_of(architecture)
    count = sum(param.numel() for param in model.module.parameters())
    about = environment(device)
    title = f"Llama of {layers} layers, {count / 1e9:,.3f} G parameters, bf16, {sequence} tokens, {about['device']}"
    circumstances = {
        **{"title": title, "layers": layers, "parameters": count, "sequence": sequence, "memory": limit},
        **{"seconds": seconds, "transformers": version("transformers"), **about},
    }
    options = ["--sequence", str(sequence), "--device", device, *(["--memory", str(limit)] if limit else [])]
    rows: list[dict[str, Any]] = []
    for i, configuration in enumerate(configurations):
        bytes_planned = planned(model, configuration, sequence)
        left = end - time.monotonic()
        if left < LEAST_SECONDS and not dry_run:
            found: dict[str, Any] = {"status": "not run", "reason": f"no time left of {seconds:.0f} s"}
        else:
            share = min(left / (len(configurations) - i), max(0.0, left - LATE))
            found = run_one(configuration, file, folder, bytes_planned, share, *options)
        rows.append(flat(configuration, bytes_planned, found))
        print(f"{configuration.title}: {found['status']} {found.get('reason', '')}", flush=True)
        write(out, rows, circumstances)
    print(table(rows))
    if failed := [f"{row['optimizer']}, {row['mode']}" for row in rows if row["status"] == "failed"]:
        raise RuntimeError(f"{'; '.join(failed)}: see headline.md and the logs in headline/")


if __name__ == "__main__":
    typer.run(main)
