"""What one program hands to another, in the compiled code: releases behind barriers, polls that acquire, reads from L2.

The interpreter runs one program after the other and has neither threads nor caches, so it cannot see these.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from compiling import chosen, compiled, over
from lowmem_kernels.factored.fields import COLUMNS as FACTORED
from lowmem_kernels.multinorm.fields import COLUMNS as MULTINORM
from lowmem_kernels.testing.aot import TARGETS

#: All kernels, with every phase, and with pointers that are computed in other ways. Targets other than the H100's
#: compile what differs most.
ON_SM_90 = (
    "adafactor-bf16-aligned-stochastic",
    "adafactor-bf16-aligned-floor",
    "adafactor-bf16-strided-stochastic",
    "came-fp32-state_fp32-aligned",
    "multinorm-bf16-rows_of_4096",
    "multinorm-bf16-table",
)
ELSEWHERE = ("adafactor-bf16-aligned-stochastic", "came-fp32-state_fp32-aligned", "multinorm-bf16-rows_of_4096")
CASES = chosen(lambda target, name: name in (ON_SM_90 if target == "sm_90" else ELSEWHERE))
#: Atomic operations on counters, in the order of the text: ticket, poll, arrival; completion, and its announcement.
ORDERS = [f"{order}, gpu" for order in ("relaxed", "acquire", "acq_rel", "acq_rel", "release")]

every_case = over(CASES)


class Language(NamedTuple):
    """Where the code is, and how its lines look: PTX, or LLVM's IR, which for AMD still has the semantics in it."""

    stage: str
    body: str
    label: str
    jump: str
    ends: str
    barrier: str
    barrier_of_stores: str
    release: str
    poll: str
    store: str
    load: str
    load_from_l2: str | None


PTX = Language(
    stage="ptx",
    body=r"\{\n(.*)^\}",
    label=r"^(\$L\w+):",
    jump=r"\bbra(?:\.uni)?\s+(\$L\w+)",
    ends=r"^\s*(ret|bra(\.uni)?\s)",
    barrier=r"\bbar(rier)?\.sync\b",
    barrier_of_stores=r"\bbar(rier)?\.sync\b",
    release=r"\.gpu\.(release|acq_rel)\b",
    poll=r"\.gpu\.acquire\b",
    store=r"\bst\.global\b",
    load=r"\bld\.global\b(?!.*\.acquire)",
    load_from_l2=r"\bld\.global\.cg\b",
)
LLIR = Language(
    stage="llir",
    body=r"^define amdgpu_kernel [^\n]*\n(.*?)^\}",
    label=r"^([\w.]+):",
    jump=r"label %([\w.]+)",
    ends=r"^\s*(br|switch|ret|unreachable)\b",
    barrier=r"@llvm\.amdgcn\.s\.barrier\(",
    # the barriers that Triton adds for shared memory have no fence, which orders what is written to global memory
    barrier_of_stores=r'fence syncscope\("workgroup"\) release',
    release=r'atomicrmw .*syncscope\("agent"\) (release|acq_rel)\b',
    poll=r'atomicrmw .*syncscope\("agent"\) acquire\b',
    store=r"\bstore .* ptr addrspace\(1\)|buffer\.store",
    load=r"= load .* ptr addrspace\(1\)|buffer\.load",
    load_from_l2=None,
)


@dataclass
class Code:
    """Lines of code, and for each the lines that may come next, and those that may come before."""

    language: Language
    lines: list[str]
    following: list[list[int]]
    preceding: list[list[int]]

    def find(self, what: str) -> list[int]:
        """The lines that match an expression."""
        return [i for i, line in enumerate(self.lines) if re.search(what, line)]

    def walk(self, start: int, edges: list[list[int]], stop: str | None = None) -> set[int]:
        """All lines that are reached from one, itself only through a loop, no further than lines that match `stop`."""
        reached: set[int] = set()
        todo = list(edges[start])
        while todo:
            i = todo.pop()
            if i in reached or (stop is not None and re.search(stop, self.lines[i])):
                continue
            reached.add(i)
            todo += edges[i]
        return reached

    def those(self, lines: Iterable[int], what: str) -> list[str]:
        """The text of those of the lines that match an expression."""
        return [self.lines[i] for i in sorted(lines) if re.search(what, self.lines[i])]


@cache
def code(target: str, name: str) -> Code:
    language = LLIR if TARGETS[target].backend == "hip" else PTX
    text = re.search(language.body, compiled(target, name).asm[language.stage], re.DOTALL | re.MULTILINE)
    assert text is not None
    lines = [line for line in text[1].splitlines() if not re.match(r"\s*(//|;|\.loc\b|$)", line)]
    places = {found[1]: i for i, line in enumerate(lines) if (found := re.match(language.label, line))}
    following = []
    for i, line in enumerate(lines):
        after = [places[label] for label in re.findall(language.jump, line)]
        if not re.match(language.ends, line) and i + 1 < len(lines):
            after.append(i + 1)
        following.append(after)
    preceding: list[list[int]] = [[] for _ in lines]
    for i, after in enumerate(following):
        for j in after:
            preceding[j].append(i)
    return Code(language, lines, following, preceding)


@every_case
def test_a_release_comes_behind_a_barrier(target, name):
    """On all ways to it, with no store in between: what other threads have written is then released with it."""
    program = code(target, name)
    releases = program.find(program.language.release)
    assert len(releases) == 3, [program.lines[i] for i in releases]
    for release in releases:
        between = program.walk(release, program.preceding, program.language.barrier_of_stores)
        assert 0 not in between, f"no barrier before {program.lines[release]}"
        assert not program.those(between, program.language.store), program.lines[release]


@every_case
def test_a_release_is_written_behind_a_barrier(target, name):
    """In the kernel itself: the compiler may happen to have a barrier there for its own use of shared memory."""
    lines = compiled(target, name).asm["ttir"].splitlines()
    releases = [i for i, line in enumerate(lines) if re.search(r"tt\.atomic_rmw \w+, (release|acq_rel),", line)]
    assert len(releases) == 3
    for release in releases:
        before = next(line for line in reversed(lines[:release]) if re.search(r"\bbarrier\b|tt\.store", line))
        assert "tt.store" not in before, before


@every_case
def test_a_poll_acquires_in_a_loop_before_a_barrier(target, name):
    """On all ways from it, with no load in between; and nothing is read from L2 that comes before it."""
    program = code(target, name)
    (poll,) = program.find(program.language.poll)
    assert poll in program.walk(poll, program.following)
    between = program.walk(poll, program.following, program.language.barrier)
    assert not program.those(between, r"^\s*ret\b")
    assert not program.those(between, program.language.load)
    if program.language.load_from_l2 is not None:
        reads = program.find(program.language.load_from_l2)
        assert reads
        early = [program.lines[i] for i in reads if poll in program.walk(i, program.following)]
        assert not early


class Access(NamedTuple):
    """An access to memory in Triton's IR.

    operation: "load" or "atomic_rmw".
    origin: the argument, or the column of the table of addresses, from which its pointer comes; "" if that is lost.
    how: of a load its cache modifier, of an atomic operation its order and scope.
    """

    operation: str
    origin: str
    how: str


#: Operations whose result points to where their first operand does, or near it.
SAME_ORIGIN = ("addptr", "splat", "broadcast", "expand_dims", "reshape")
ACCESS = re.compile(
    r"tt\.(?:(load) %(\w+).*?(?:cacheModifier = (\w+))?(?: \{.*\})? :|(atomic_rmw) \w+, (\w+, \w+), %(\w+))"
)


@cache
def accesses(target: str, name: str) -> list[Access]:
    """Loads and atomic operations, in the order of the text, in which origins are followed: regions share names."""
    ttir = compiled(target, name).asm["ttir"]
    columns = MULTINORM if name.startswith("multinorm") else FACTORED
    origin = {argument: argument for argument in re.findall(r"%(\w+): !tt\.ptr", ttir)}
    found = []
    for line in ttir.splitlines():
        if access := ACCESS.search(line):
            load, loaded, modifier, atomic, order, counter = access.groups()
            pointer = loaded or counter
            found.append(Access(load or atomic, origin.get(pointer, ""), order or modifier or ""))
        if made := re.match(r"\s*%(\w+)(?::\d+)? = tt\.(\w+) %(\w+)(?:, %c(\d+)_i32)?", line):
            result, operation, operand, constant = made.groups()
            base = origin.pop(operand, "") if result == operand else origin.get(operand, "")
            origin.pop(result, None)
            if operation in SAME_ORIGIN:
                origin[result] = base
            # an address is read from the parameter's row of them: the row's place, then a constant
            if base.startswith("addresses_ptr") and operation == "addptr":
                origin[result] = f"addresses_ptr {columns[int(constant or 0)]}"
            if base.startswith("addresses_ptr ") and operation in ("load", "int_to_ptr"):
                origin[result] = base if operation == "load" else base.split()[1]
    return found


@every_case
def test_what_other_programs_wrote_is_read_from_l2(target, name):
    """All of the scratch, and CAME's momentum in the phase after the one that wrote it."""
    loads = [access for access in accesses(target, name) if access.operation == "load"]
    assert all(load.origin for load in loads)
    scratch = [load.how for load in loads if load.origin == "scratch_ptr"]
    assert len(scratch) >= 8
    assert set(scratch) == {"cg"}
    momentum = [load.how for load in loads if load.origin == "exp_avg"]
    if name.startswith("came"):
        # the residual's phase, whose momentum an earlier launch wrote, comes first in the text
        assert momentum == ["", "cg"]
    else:
        # others write a momentum in the last phase, and read it in that one and before
        assert set(momentum) == ({""} if name == "multinorm-bf16-table" else set())


@every_case
def test_counters_are_ordered_for_the_whole_gpu_and_tickets_not_at_all(target, name):
    atomics = [access for access in accesses(target, name) if access.operation == "atomic_rmw"]
    assert [access.how for access in atomics if access.origin == "counters_ptr"] == ORDERS
    assert [access.how for access in atomics if access.origin != "counters_ptr"] == ["relaxed, gpu"]  # of skipped_ptr
