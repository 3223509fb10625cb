"""The static report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lowmem_kernels.device import HOPPER

# columns of matrices in GPT-2, LLaMA-7B, Llama-3-8B and Llama-3-70B
COLUMNS = (768, 4096, 8192, 11008, 14336, 28672)
TILE_ROWS = 16  # of the factored kernels' wide tile

INTRO = """# Static report

Written by `make report`, without a GPU: nothing here was measured on one. Torch {torch}, Triton {triton}.
`report.json` has the same numbers.
"""

KERNELS = """## Machine code

*Registers* are per thread (on gfx942 vector registers, accumulation registers included), *stack* and *shared* in bytes,
*spills* instructions that access private memory (on gfx942 spilled registers). *Programs* is how many fit on a
processor at a time, by registers, shared memory, warps and the limit on blocks; *warps* what share of the warps that it
can hold they are. *Access* is the width in bits of the narrowest and the widest load / store of a whole tile in the
loops over tiles; 16-byte accesses are 128. A misaligned or strided layout is promised nothing, so it goes element by
element.

*Instructions for each element*: the instructions of a loop over tiles in the machine code, divided by the elements that
one thread has in a tile. A loop is a natural loop of the code that has loads or stores of whole tiles and no other such
loop inside; it is named after the source function, and the number of the loop there: look_factored_tile 3 and 4 are the
two sweeps, look_full_tile is for vectors. It does not tell what is executed: both sides of a branch are counted (the
factored kernels treat matrices and vectors in one loop), called subroutines (divisions of 64-bit integers) are not, an
inner loop counts once however often it goes round, and instructions differ
in cost. To compare with: 132 processors with 128 lanes at 1.98 GHz issue 7 instructions in the time in which 4.8 TB/s
of an H200's data sheet move one byte. That is 154 for the 22 bytes of AdamW in bfloat16, 140 for the 20 of CAME and 56
for the 8 of Adafactor, over all loops that an element goes through.
"""

VERBS = """## Bytes for each element

Counted in Triton's interpreter on matrices with few rows. *Formula* and *requested* are of what has the matrix's shape
(parameter, gradient, moments); *factors* are row and column factors; *rest* is the scratch with its column sums,
tables, counters and steps. *At DRAM* is what a cache would move that forgets the line least recently used: 128-byte
lines, half as large as the matrix of gradients, programs one after the other; its formula is the one where the second
sweep over a block of rows comes from the cache. Tables and counters are left out there. A real cache has many programs
at a time, sets, and other policies.

| verb | matrix | dtype | formula, read + written | requested | factors | rest | DRAM formula | at DRAM | rest there |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""

CURVES = """## Cache size and order

Bytes for each element at DRAM, of parameter, gradient and moments of a {shape} matrix in {dtype}, against the size of
the cache in units of the matrix of gradients. *Order* "reverse" is the kernels' own: every second phase over the rows
goes backwards, so that it begins with what was read last. *At a time*: one program after the other, or half or all of a
phase's programs in turns, access by access. A GPU with two programs on each of 132 processors has 264 at a time: all of
a matrix with 4096 rows (256 blocks of 16), and 38 % of one with 11008.

| verb | order | programs at a time | {sizes} |
|---|---|---|{dashes}|
{rows}
"""

SWEEPS = """## Between the two sweeps

The first look at a matrix sweeps each block of {rows} rows twice. The second sweep finds the rows in the L2 cache if
all that was read in between fits: at most one block for each program on the GPU. In MB, bfloat16, for {processors}
processors with {l2:.0f} MB of L2 ({device}), by programs on a processor; bold where it does not fit. Then the second
sweep comes from DRAM too, as for "all" programs at a time in the table above.

| columns | {headers} |
|---|{dashes}|
{lines}
"""


def render(report: dict[str, Any]) -> str:
    """Return the whole report."""
    sections = [INTRO.format(**report["versions"]), _summary(report), KERNELS]
    for target in dict.fromkeys(row["target"] for row in report["kernels"]):
        sections.append(f"### {target}\n\n{_kernel_table(target, report['kernels'])}\n")
    sections += [
        VERBS.format(rows="\n".join(map(_verb_row, report["verbs"]))),
        _curves(report["curves"]),
        _sweeps(report),
    ]
    return "\n".join(sections)


def _summary(report: dict[str, Any]) -> str:
    kernels, verbs = report["kernels"], report["verbs"]
    spilled = sorted(f"{row['case']} ({row['target']})" for row in kernels if row["stack_bytes"] or row["spills"])
    exact = sum(row["requested"] == row["formula"] for row in verbs)
    aligned = list(filter(_aligned, kernels))
    narrow = [row for row in aligned if min(row["bulk_load_bits"] + (row["bulk_store_bits"] or [])) < 128]
    return (
        f"{len(kernels)} specializations. Private memory is used by {len(spilled)}: {', '.join(spilled) or 'none'}. "
        f"Accesses narrower than 16 bytes in the loops over tiles of {len(narrow)} of the "
        f"{len(aligned)} aligned ones. Requested bytes equal the formula in {exact} of {len(verbs)} runs.\n"
    )


def _aligned(row: dict[str, Any]) -> bool:
    return "misaligned" not in row["case"] and "strided" not in row["case"]


def _kernel_table(target: str, kernels: Iterable[dict[str, Any]]) -> str:
    rows = [
        "| case | registers | stack | spills | shared | programs | warps | access | instructions for each element |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in kernels:
        if row["target"] == target:
            widths = " / ".join(_range(row[f"bulk_{kind}_bits"]) for kind in ("load", "store"))
            loops = ", ".join(f"{loop['name'].lstrip('_')} {loop['per_element']}" for loop in row["loops"])
            figures = (row[key] for key in ("registers", "stack_bytes", "spills", "shared_bytes", "programs"))
            cells = [row["case"], *map(str, figures), f"{row['occupancy']:.0%}", widths, loops]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _range(bits: Sequence[int] | None) -> str:
    if bits is None:
        return "-"
    return f"{bits[0]}" if bits[0] == bits[1] else f"{bits[0]}-{bits[1]}"


def _verb_row(row: dict[str, Any]) -> str:
    pair = {key: f"{row[key]['read']:g} + {row[key]['written']:g}" for key in ("formula", "requested")}
    cells = [
        row["verb"], " x ".join(map(str, row["shape"])), row["dtype"], pair["formula"], pair["requested"],
        f"{row['requested_factors']:g}", f"{row['requested_rest']:g}", f"{row['dram_formula']:g}", f"{row['dram']:g}",
        f"{row['dram_rest']:g}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _curves(curves: dict[str, Any]) -> str:
    sizes = curves["cache_of_gradients"]
    return CURVES.format(
        shape=" x ".join(map(str, curves["shape"])),
        dtype=curves["dtype"],
        sizes=" | ".join(map(str, sizes)),
        dashes="|".join(["---"] * len(sizes)),
        rows="\n".join(
            f"| {row['verb']} | {row['order']} | {row['in_flight']} | {' | '.join(map(str, row['dram']))} |"
            for row in curves["rows"]
        ),
    )


def _sweeps(report: dict[str, Any]) -> str:
    programs = sorted({row["programs"] for row in report["kernels"] if row["target"] == "sm_90" and _sweeps_twice(row)})
    lines = []
    for columns in COLUMNS:
        cells = [str(columns)]
        for number in programs:
            nbytes = number * HOPPER.sm_count * TILE_ROWS * columns * 2
            cells.append(f"**{nbytes / 2**20:.0f}**" if nbytes > HOPPER.l2_bytes else f"{nbytes / 2**20:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return SWEEPS.format(
        rows=TILE_ROWS,
        processors=HOPPER.sm_count,
        l2=HOPPER.l2_bytes / 2**20,
        device=HOPPER.name,
        headers=" | ".join(f"{number} program{'s' * (number > 1)}" for number in programs),
        dashes="|".join(["---"] * len(programs)),
        lines="\n".join(lines),
    )


def _sweeps_twice(row: dict[str, Any]) -> bool:
    return _aligned(row) and any(loop["name"].startswith("look_factored") for loop in row["loops"])
