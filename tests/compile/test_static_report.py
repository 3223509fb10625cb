"""The committed report is of the kernels as they are, and its figures are right."""

import importlib
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_kernels.testing import bytes_moved, compile_cases
from lowmem_kernels.testing.aot import TARGETS, compile_case, inspect_kernel

BENCH = Path(__file__).parents[2] / "bench"
REPORT = json.loads((BENCH / "static_report" / "report.json").read_text())
KERNELS = {(row["target"], row["case"]): row for row in REPORT["kernels"]}
#: Of each target: warps and KiB of shared memory of a processor, bytes of it that every program costs on top.
LIMITS = {"sm_80": (64, 164, 1024), "sm_90": (64, 228, 1024), "sm_100": (64, 228, 1024), "gfx942": (32, 64, 0)}


def test_it_lists_every_case():
    expected = {(target, case.name) for target, gpu in TARGETS.items() for case in compile_cases(gpu.warp_size)}
    assert KERNELS.keys() == expected
    assert len(REPORT["kernels"]) == len(expected)


def programs_that_fit(target, registers, shared, warps):
    """By the rules of the hardware, written anew: the least of what registers, memory, warps and 32 blocks allow."""
    most, kibibytes, reserved = LIMITS[target]
    # 512 registers for each lane of one of four schedulers, given out by eights; a warp stays with its scheduler
    by_registers = 4 * (512 // (-(-registers // 8) * 8)) // warps
    by_memory = kibibytes * 1024 // (shared + reserved) if shared + reserved else 32
    return min(by_registers, by_memory, most // warps, 32)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 128, 8192, 8, 2),  # 65536 / (128 * 256)
        ("sm_90", 129, 8192, 8, 1),  # 136 are granted: three warps for each scheduler
        ("sm_90", 79, 4096, 4, 6),  # 80 are granted: six warps for each scheduler
        ("sm_90", 32, 16, 4, 16),  # 2048 threads
        ("sm_80", 32, 40 * 1024, 4, 4),  # 164 KB / 41 KB
        ("gfx942", 96, 16384, 8, 2),  # five waves for each SIMD, but a program takes two of each
        ("gfx942", 64, 20000, 4, 3),  # 64 KB / 20000
    ],
)
def test_programs_by_hand(target, registers, shared, warps, programs):
    assert programs_that_fit(target, registers, shared, warps) == programs


def test_occupancy():
    for (target, name), row in KERNELS.items():
        programs = programs_that_fit(target, row["registers"], row["shared_bytes"], row["warps"])
        assert row["programs"] == programs, (target, name)
        assert row["occupancy"] == programs * row["warps"] / LIMITS[target][0], (target, name)


def test_every_loop_is_whole():
    for key, row in KERNELS.items():
        assert row["loops"], key
        assert row["instructions"] > sum(loop["instructions"] for loop in row["loops"]), key
        for loop in row["loops"]:
            assert loop["per_element"] == round(loop["instructions"] / loop["elements"], 1), key
        # tiles of "fast" products are copied to shared memory, which are no loads; AMD's compiler loads fp32 operands
        # of products in the pieces in which they are multiplied
        exempt = key[1].endswith("-fast") or key == ("gfx942", "apollo-fp32-rank_64")
        if "misaligned" not in key[1] and "strided" not in key[1] and not exempt:
            # 16-byte accesses, or all that a thread has of a tile where that is less (states have more bits)
            dtype = key[1].split("-")[1]
            bits = {"bf16": 16, "fp16": 16, "fp32": 32}[dtype] * min(loop["elements"] for loop in row["loops"])
            for kind in ("load", "store"):
                narrowest, widest = row[f"bulk_{kind}_bits"] or [min(bits, 128), 128]
                assert narrowest in (min(bits, 128), 128), key
                assert widest in (narrowest, 128), key


@pytest.mark.skipif(REPORT["versions"]["triton"] != version("triton"), reason="registers depend on Triton's version")
@pytest.mark.parametrize("name", ["scaled_update-bf16-aligned-stochastic", "grad_stats-fp32-aligned"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_it_says_what_is_compiled_now(target, name):
    case = next(case for case in compile_cases(TARGETS[target].warp_size) if case.name == name)
    report = inspect_kernel(compile_case(case, target), target)
    row = KERNELS[target, name]
    found = (report.registers, report.stack_bytes, report.spills, report.shared_bytes, report.instructions)
    assert found == tuple(row[key] for key in ("registers", "stack_bytes", "spills", "shared_bytes", "instructions"))


def test_verbs_request_what_their_formulas_say():
    assert {row["verb"] for row in REPORT["verbs"]} >= {"adamw", "scaled_update", "grad_stats", "came"}
    for row in REPORT["verbs"]:
        assert row["requested"] == row["formula"], row
        # three blocks of rows and a cache of half of them: the second sweep comes from the cache, and where a phase
        # goes backwards part of what was read last, of which a table's rule has three of seven
        assert -1.5 <= row["dram"] - row["dram_formula"] <= 0.3, row
    adamw = next(row for row in REPORT["verbs"] if row["verb"] == "adamw" and row["dtype"] == "bf16")
    assert (adamw["formula"]["read"], adamw["formula"]["written"]) == bytes_moved("adamw", 1, 2, 4)


def test_a_larger_cache_never_moves_more():
    for row in REPORT["curves"]["rows"]:
        assert row["dram"] == sorted(row["dram"], reverse=True), row


def test_backwards_a_cache_smaller_than_the_matrix_helps():
    curves = {(row["verb"], row["order"], row["in_flight"]): row["dram"] for row in REPORT["curves"]["rows"]}
    half = REPORT["curves"]["cache_of_gradients"].index(0.5)
    for verb in {verb for verb, _, _ in curves}:
        assert curves[verb, "reverse", "one"][half] < curves[verb, "forward", "one"][half]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return lambda name: importlib.import_module(name)


def test_the_text_is_of_these_figures(bench):
    assert (BENCH / "static_report" / "report.md").read_text() == bench("static_markdown").render(REPORT)


@pytest.mark.parametrize(
    ("share", "order"),
    [(0.0, "aab ccc d e"), (0.5, "aab ccc d e"), (0.7, "aba ccc de"), (1.0, "abca cc de")],
)
def test_programs_take_turns(bench, share, order):
    """Launch 0 has programs a, b and c, launch 1 has d and e."""
    programs = {"a": (0, 0, 2), "b": (0, 1, 1), "c": (0, 2, 3), "d": (1, 0, 1), "e": (1, 1, 1)}
    trace = [
        SimpleNamespace(launch=launch, program=program, name=name)
        for name, (launch, program, accesses) in programs.items()
        for _ in range(accesses)
    ]
    found = "".join(access.name for access in bench("static_report").in_turns(trace, share))
    assert found == order.replace(" ", "")
