"""Compile a kernel for a GPU that is not there and read what the compiler made of it.

A `CompileCase` describes one specialization and `compile_case` compiles it; `inspect_kernel` reads the machine code
(registers, spills, access widths) and `narrow_offsets` the address arithmetic. None of it works under
TRITON_INTERPRET=1, where `@triton.jit` makes functions that cannot be compiled.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class CompileCase:
    """One specialization of a kernel: what Triton's launcher would derive from the arguments of a call.

    name: shown in test ids and reports.
    kernel: the function decorated with `@triton.jit`.
    signature: type of each run-time argument, such as "*bf16", "*i64", "i32" or "fp32".
    constexprs: value of each compile-time argument; None stands for an absent optional pointer.
    divisible_by_16: run-time arguments that are multiples of 16 (for a pointer: aligned to 16 bytes).
    options: compiler options, such as num_warps, num_stages and enable_fp_fusion.
    """

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelReport:
    """Facts of a kernel's machine code; every count is static, one per instruction in the listing.

    registers: per thread (on AMD vector registers, accumulation registers included).
    stack_bytes: private memory per thread.
    spills: instructions that access private memory (NVIDIA), or vector registers spilled (AMD).
    shared_bytes: shared memory per block that the kernel asks for.
    programs: resident blocks per multiprocessor; 0 means that it cannot launch.
    occupancy: resident threads per multiprocessor over the most it can hold, in [0, 1].
    instructions: number of instructions, padding left out.
    loads, stores: global memory accesses by width in bits per thread, without bulk copies (TMA) and AMD's scalar loads.
    atomics: global atomic instructions.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    programs: int
    occupancy: float
    instructions: int
    loads: Counter[int]
    stores: Counter[int]
    atomics: int

    @property
    def spilled(self) -> bool:
        """Whether some values live in private memory because registers ran out."""
        return self.stack_bytes > 0 or self.spills > 0

    @property
    def widest(self) -> int:
        """Width in bits of the widest global load or store, 0 if there is none."""
        return max((self.loads | self.stores).keys(), default=0)

    def narrow_loads(self, below_bits: int) -> int:
        """Number of global loads narrower than `below_bits` bits per thread."""
        return sum(count for bits, count in self.loads.items() if bits < below_bits)

    def narrow_stores(self, below_bits: int) -> int:
        """Number of global stores narrower than `below_bits` bits per thread."""
        return sum(count for bits, count in self.stores.items() if bits < below_bits)


@dataclass(frozen=True)
class NarrowOffset:
    """One pointer addition whose offset has fewer than 64 bits.

    pointer: the kernel argument that the address starts from; for a pointer made inside the kernel, its variable.
    offset_type: the offset's type in Triton's IR, such as "i32" or "tensor<1024xi32>".
    source: where it is written, "file.py:line".
    """

    pointer: str
    offset_type: str
    source: str


def compile_case(case: CompileCase, target_name: str) -> CompiledKernel:
    """Compile `case` for TARGETS[target_name], without needing that GPU.

    Raises KeyError for an unknown target, and ValueError unless signature and constexprs together name every argument
    of the kernel exactly once and divisible_by_16 names run-time arguments.
    """
    names = case.kernel.arg_names
    if sorted([*case.signature, *case.constexprs]) != sorted(names):
        raise ValueError(f"{case.name}: signature and constexprs must together name each of {', '.join(names)} once")
    if unknown := set(case.divisible_by_16) - set(case.signature):
        raise ValueError(f"{case.name}: divisible_by_16 names {', '.join(sorted(unknown))}, not in the signature")
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=case.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    return triton.compile(source, target=TARGETS[target_name], options=case.options)


def inspect_kernel(compiled: CompiledKernel, target_name: str) -> KernelReport:
    """Read the machine code of a kernel compiled for TARGETS[target_name].

    Raises KeyError for an unknown target, ValueError if the kernel was compiled for another, and CalledProcessError if
    NVIDIA's disassembler, which comes with Triton, refuses the binary.
    """
    if compiled.metadata.target != TARGETS[target_name]:
        raise ValueError(f"{compiled.name} was compiled for {compiled.metadata.target}, not for {target_name}")
    facts = _read_amd(compiled) if TARGETS[target_name].backend == "hip" else _read_nvidia(compiled)
    shared_bytes = compiled.metadata.shared
    limits, num_warps = _LIMITS[target_name], compiled.metadata.num_warps
    programs = limits.programs(facts["registers"], shared_bytes, num_warps)
    occupancy = programs * num_warps / (4 * limits.warps_per_partition)
    return KernelReport(shared_bytes=shared_bytes, programs=programs, occupancy=occupancy, **facts)


def narrow_offsets(compiled: CompiledKernel) -> list[NarrowOffset]:
    """List the pointer additions whose offset is not an i64; those reach at most 2**31 elements.

    Small offsets into a table or a scalar are harmless: the caller allows them by `pointer`. A product that overflowed
    in 32 bits before it was widened is not seen.
    """
    text = compiled.asm["ttir"]
    line_of = source_lines(compiled)
    arguments = set(re.findall(r"%(\w+): ", "".join(re.findall(r"tt\.func .*", text))))
    # sibling regions reuse names, so the origin of a pointer is tracked in the order of the text
    origin: dict[str, str] = {}
    found = []
    for line in text.splitlines():
        if derived := re.match(r"\s*%(\w+) = tt\.(?:splat|addptr|broadcast|expand_dims|bitcast|reshape) %(\w+)", line):
            result, base = derived.groups()
            origin[result] = origin.get(base, base)
        addition = re.match(r"\s*%\w+ = tt\.addptr %(\w+),.*, (\S+) loc\((.*)\)$", line)
        if addition and not re.search(r"\bi64$|xi64>$", addition[2]):
            root = origin.get(addition[1], addition[1])
            # the IR appends _<number> to the names of variables
            pointer = root if root in arguments else re.sub(r"_\d+$", "", root)
            found.append(NarrowOffset(pointer, addition[2], line_of(addition[3])))
    return found


def source_lines(compiled: CompiledKernel) -> Callable[[str], str]:
    """Return what follows a location in Triton's IR to the innermost "file.py:line" it stands for, or "unknown"."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", compiled.asm["ttir"], re.MULTILINE))

    def line_of(location: str) -> str:
        while not (place := re.search(r'"([^"]+)":(\d+):\d+', location)):
            alias = re.search(r"#loc\d*", location)
            if alias is None:
                return "unknown"
            location = locations[alias[0]]
        return f"{Path(place[1]).name}:{place[2]}"

    return line_of


@dataclass(frozen=True)
class _Limits:
    """What one multiprocessor holds; each has 4 partitions with 512 registers per lane, given out 8 at a time."""

    warps_per_partition: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, per block
    blocks: int = 32

    def programs(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        granted = max(8, -(-registers // 8) * 8)
        warps = 4 * min(self.warps_per_partition, 512 // granted)
        blocks_by_shared = self.shared_bytes // max(1, shared_bytes + self.reserved_bytes)
        return min(self.blocks, warps // num_warps, blocks_by_shared)


_LIMITS = {
    "sm_80": _Limits(warps_per_partition=16, shared_bytes=164 << 10, reserved_bytes=1 << 10),
    "sm_90": _Limits(warps_per_partition=16, shared_bytes=228 << 10, reserved_bytes=1 << 10),
    "sm_100": _Limits(warps_per_partition=16, shared_bytes=228 << 10, reserved_bytes=1 << 10),
    "gfx942": _Limits(warps_per_partition=8, shared_bytes=64 << 10, reserved_bytes=0),
}


def nvidia_access(opcode: str) -> tuple[str, int] | None:
    """Return ("load" or "store", bits per thread) of a global access in NVIDIA's machine code, None for others."""
    name, *parts = opcode.split(".")
    kinds = {"LDG": "load", "LDGSTS": "load", "LD": "load", "STG": "store", "ST": "store"}
    # the address size .E, cache hints and scopes are also parts of an opcode; one without a width moves 32 bits
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return (kinds[name], next((widths[part] for part in parts if part in widths), 32)) if name in kinds else None


def amd_access(opcode: str) -> tuple[str, int] | None:
    """Return ("load" or "store", bits per thread) of a global access in AMD's machine code, None for others."""
    # ushort and sbyte name the extension of a load, _d16 and _hi the half of the register it goes to
    pattern = r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(dwordx\d|dword|short|byte)(?:_d16)?(?:_hi)?$"
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    match = re.match(pattern, opcode)
    return (match[1], widths[match[2]]) if match else None


def by_kind(accesses: Counter[tuple[str, int]]) -> dict[str, Counter[int]]:
    """Split counts of accesses into {"loads": by width, "stores": by width}."""
    return {
        f"{kind}s": Counter({bits: count for (k, bits), count in accesses.items() if k == kind})
        for kind in ("load", "store")
    }


@lru_cache(maxsize=8)
def disassembled(cubin: bytes) -> str:
    """Return NVIDIA's listing of a binary, with line information; it takes seconds, so the last few are kept."""
    with _as_file(cubin) as path:
        # what its analysis of branches by a stack would add, these binaries do not have: the text is the same without
        return _run(triton.knobs.nvidia.nvdisasm.path, "-c", "-g", "-ndf", path)


@contextmanager
def _as_file(cubin: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        yield str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_nvidia(compiled: CompiledKernel) -> dict[str, Any]:
    with _as_file(compiled.asm["cubin"]) as path:
        resources = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
    text = disassembled(compiled.asm["cubin"])
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)
    opcodes = [opcode for opcode in found if opcode != "NOP"]
    accesses = Counter(access for opcode in opcodes if (access := nvidia_access(opcode)))
    memory = [opcode.split(".")[0] for opcode in opcodes]
    return {
        "registers": int(re.findall(r"\bREG:(\d+)", resources)[0]),
        "stack_bytes": int(re.findall(r"\bSTACK:(\d+)", resources)[0]),
        "spills": sum(name in ("LDL", "STL") for name in memory),
        "instructions": len(opcodes),
        **by_kind(accesses),
        "atomics": sum(name in ("ATOM", "ATOMG", "RED", "REDG") for name in memory),
    }


def _read_amd(compiled: CompiledKernel) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    opcodes = [opcode for opcode in re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE) if opcode != "s_nop"]

    def metadata(key: str) -> int:
        return int(re.findall(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)[0])

    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        # spilled scalar registers go to lanes of vector registers, not to memory
        "spills": metadata("vgpr_spill_count"),
        "instructions": len(opcodes),
        **by_kind(Counter(access for opcode in opcodes if (access := amd_access(opcode)))),
        "atomics": sum(bool(re.match(r"(global|buffer|flat)_atomic_", opcode)) for opcode in opcodes),
    }
