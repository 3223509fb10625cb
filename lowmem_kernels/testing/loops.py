"""Find the loops in a kernel's machine code that walk over tiles, and what one element costs there.

A tile loop is an innermost loop among those with a bulk access, a load or store of a tensor that has the shape of the
kernel's tile, which its constexprs BLOCK, or BLOCK_ROWS and BLOCK_COLS, say. It is written in a function that takes
these: what else has the same shape by chance does not count. Line information tells which is which.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from triton.compiler import CompiledKernel

from .aot import TARGETS, CompileCase, amd_access, by_kind, disassembled, nvidia_access, source_lines

_FILE_AND_LINE = re.compile(r'"([^"]+)":(\d+):\d+')


@dataclass(frozen=True)
class TileLoop:
    """One innermost loop with bulk accesses.

    name: the function and, where it has several loops, the number of the one that most instructions come from.
    instructions: in the loop's code, without called subroutines; of branches both sides, whichever is taken.
    elements: that one thread has in an iteration.
    loads, stores: bulk accesses by width in bits per thread.
    """

    name: str
    instructions: int
    elements: int
    loads: Counter[int]
    stores: Counter[int]

    @property
    def instructions_per_element(self) -> float:
        """Instructions of the loop's code for each element of a thread."""
        return self.instructions / self.elements


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    line: str  # "file.py:12"
    target: str | None  # label that a branch jumps to
    falls_through: bool  # whether the next instruction may follow


def tile_loops(case: CompileCase, compiled: CompiledKernel, target_name: str) -> list[TileLoop]:
    """List the tile loops of a case compiled for TARGETS[target_name], in the order of their code.

    A tile is as large as the constants BLOCK_* say, and in a function apply_* or moment* as APPLY_* or MOMENT_* do if
    there are any.

    Raises KeyError for an unknown target, and ValueError if the code has no bulk access in a loop.
    """
    amd = TARGETS[target_name].backend == "hip"
    tiles = {
        prefix: [value for name, value in case.constexprs.items() if name.startswith(prefix)]
        for prefix in ("BLOCK", "APPLY", "MOMENT_")
    }
    threads = case.options["num_warps"] * TARGETS[target_name].warp_size
    bulk = {line for shape in tiles.values() if shape for line in _bulk_lines(compiled, shape)}
    code, labels = _parse(compiled.asm["amdgcn"] if amd else disassembled(compiled.asm["cubin"]), amd)
    access = amd_access if amd else nvidia_access
    paths = _source_files(case, compiled)
    bulk_accesses = {
        i: accessed
        for i, instruction in enumerate(code)
        if instruction.line in bulk and (accessed := access(instruction.opcode))
    }
    found = []
    for loop in _innermost(_loops(code, labels), bulk_accesses.keys()):
        inside = Counter(accessed for i, accessed in bulk_accesses.items() if i in loop)
        if name := _name((code[i].line for i in loop), paths):
            own = [shape for prefix, shape in tiles.items() if shape and name.startswith(prefix.lower().rstrip("_"))]
            shape = own[0] if own else tiles["BLOCK"]
            found.append(TileLoop(name, len(loop), math.prod(shape) // threads, **by_kind(inside)))
    if not found:
        raise ValueError(f"{case.name}: no loop with a load or store of a tile of {tiles['BLOCK']}")
    return found


def _source_files(case: CompileCase, compiled: CompiledKernel) -> dict[str, Path]:
    """The source files of a kernel by their names.

    Triton keeps compiled code by what the source says, so the paths in it may be those of another checkout.
    """
    recorded = {Path(path).name: Path(path) for path, _ in _FILE_AND_LINE.findall(compiled.asm["ttir"])}
    own = Path(case.kernel.fn.__code__.co_filename)
    here, there = own.parts, recorded[own.name].parts
    same = next((i for i, (a, b) in enumerate(zip(here[::-1], there[::-1], strict=False)) if a != b), len(here))
    root, other_root = Path(*here[: len(here) - same]), Path(*there[: len(there) - same])
    return {
        name: root / path.relative_to(other_root) if path.is_relative_to(other_root) else path
        for name, path in recorded.items()
    }


def _bulk_lines(compiled: CompiledKernel, shape: list[int]) -> set[str]:
    """Source lines of the loads and stores of whole tiles."""
    operation = re.compile(rf"tt\.(?:load|store) .*tensor<{'x'.join(map(str, shape))}x!tt\.ptr<\w+>> loc\((.*)\)$")
    locations = source_lines(compiled)
    lines = compiled.asm["ttir"].splitlines()
    return {locations(match[1]) for line in lines if (match := operation.search(line))}


def _loops(code: list[_Instruction], labels: dict[str, int]) -> list[set[int]]:
    """The natural loops, as sets of instructions, in the order of their entries.

    Compilers put unlikely code elsewhere and jump back from there, so not every jump backwards closes a loop: only one
    to an instruction that lies on every way to it.
    """
    ends = {i + 1 for i, instruction in enumerate(code) if instruction.target or not instruction.falls_through}
    starts = sorted({0, *(start for start in labels.values() if start < len(code)), *(ends - {len(code)})})
    blocks = {start: range(start, end) for start, end in pairwise([*starts, len(code)])}
    before: dict[int, set[int]] = {start: set() for start in starts}
    for start, block in blocks.items():
        last = code[block[-1]]
        following = {block.stop} if last.falls_through else set()
        for successor in following | {labels.get(last.target or "", len(code))}:
            if successor < len(code):
                before[successor].add(start)
    dominators = _dominators(starts, before)
    members: dict[int, set[int]] = {}
    for entry in starts:
        for closing in before[entry]:
            if entry in dominators[closing]:
                loop = members.setdefault(entry, {entry})
                reaching = [closing]
                while reaching:
                    start = reaching.pop()
                    if start not in loop:
                        loop.add(start)
                        reaching += before[start]
    return [{i for start in loop for i in blocks[start]} for _, loop in sorted(members.items())]


def _dominators(starts: list[int], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """For each block the blocks that lie on every way to it from the first; none for what cannot be reached."""
    everything = set(starts)
    dominators = {start: everything for start in starts} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for start in starts[1:]:
            common = set.intersection(everything, *(dominators[earlier] for earlier in before[start])) | {start}
            if common != dominators[start]:
                dominators[start], changed = common, True
    return {start: found if found != everything else set() for start, found in dominators.items()}


def _innermost(loops: list[set[int]], accesses: Iterable[int]) -> list[set[int]]:
    """Loops that have an access and no other loop with an access inside; an inner loop without one does not count."""
    used = [loop for loop in loops if not loop.isdisjoint(accesses)]
    return [loop for loop in used if not any(other < loop for other in used)]


def _parse(listing: str, amd: bool) -> tuple[list[_Instruction], dict[str, int]]:
    """Instructions, padding left out, and for each label the number of the instruction after it."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    line = ""
    for text in listing.splitlines():
        if place := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            line = f"{Path(place[1]).name}:{place[2]}"
        elif place := re.match(r"\t\.loc\t.*; (\w+\.py:\d+):\d+", text):
            line = place[1]
        elif label := re.match(r"(\S+):(?:\s|$)", text):
            labels[label[1]] = len(code)
        elif (instruction := _amd_instruction(text, line) if amd else _nvidia_instruction(text, line)) is not None:
            code.append(instruction)
    return code, labels


def _nvidia_instruction(text: str, line: str) -> _Instruction | None:
    match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)(.*)", text)
    if match is None or match[2] == "NOP":
        return None
    predicate, opcode, operands = match.groups()
    target = re.search(r"`\((\S+)\)", operands) if opcode.startswith("BRA") else None
    # a branch can have a second condition among its operands
    leaves = opcode.startswith(("BRA", "EXIT", "RET")) and predicate is None and not re.match(r"\s*!?U?P\d", operands)
    return _Instruction(opcode, line, target and target[1], not leaves)


def _amd_instruction(text: str, line: str) -> _Instruction | None:
    match = re.match(r"\t([a-z]\w+)(.*)", text)
    if match is None or match[1] == "s_nop":
        return None
    opcode, operands = match.groups()
    target = re.search(r"\.LBB\w+", operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
    return _Instruction(opcode, line, target and target[0], opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"))


def _name(lines: Iterable[str], paths: dict[str, Path]) -> str | None:
    """Which loop of the source most of these lines are in; None if none of them is in one over tiles."""
    votes: Counter[str] = Counter()
    for line in lines:
        file, _, number = line.rpartition(":")
        if file in paths and (loop := _source_loop(paths[file], int(number))):
            votes[loop] += 1
    return min(votes, key=lambda name: (-votes[name], name)) if votes else None


def _source_loop(path: Path, line: int) -> str | None:
    """The innermost loop over tiles of a source file that a line is in."""
    inside = [(end - start, name) for start, end, name in _source_loops(path) if start <= line <= end]
    return min(inside)[1] if inside else None


@cache
def _source_loops(path: Path) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of the loops in a source file's functions that take the size of a tile."""
    found = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and any(arg.arg.startswith("BLOCK") for arg in function.args.args):
            loops = sorted(
                (node.lineno, node.end_lineno or node.lineno)
                for node in ast.walk(function)
                if isinstance(node, (ast.For, ast.While))
            )
            for k, (start, end) in enumerate(loops, 1):
                found.append((start, end, function.name if len(loops) == 1 else f"{function.name} {k}"))
    return found
