"""Kernels compiled for GPUs that are not there: each case once in a process, for all tests of all modules."""

from collections.abc import Callable, Iterable
from functools import cache

import pytest
import triton
from triton.compiler import CompiledKernel

from lowmem_kernels.testing import compile_cases
from lowmem_kernels.testing.aot import TARGETS, CompileCase, KernelReport, compile_case, inspect_kernel
from lowmem_kernels.testing.lowrank_specializations import problem_cases
from lowmem_kernels.testing.multinorm_specializations import whole_case
from lowmem_kernels.testing.projection_specializations import draw_case
from lowmem_kernels.testing.whitening_specializations import advance_case

#: Triton 3.6.0, the oldest that is supported, puts some more numbers aside; pip installs it without metadata.
IS_OLDEST = triton.__version__.startswith("3.6.")

_CASES = {
    (target, case.name): case
    for target, gpu in TARGETS.items()
    for case in (
        *compile_cases(gpu.warp_size),
        whole_case(gpu.warp_size),
        advance_case(),
        draw_case(),
        *problem_cases(gpu.warp_size),
    )
}


def chosen(choose: Callable[[str, str], bool]) -> dict[tuple[str, str], CompileCase]:
    """The cases of which ``choose(target, name)`` is true, by target and name."""
    return {key: case for key, case in _CASES.items() if choose(*key)}


def over(cases: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrization by ``target`` and ``name``. With --dist loadgroup one worker runs all tests of a case."""
    keys = [pytest.param(*key, id="-".join(key)) for key in cases]
    return pytest.mark.parametrize(("target", "name"), keys)


@cache
def compiled(target: str, name: str) -> CompiledKernel:
    """A case's kernel; a second or more."""
    return compile_case(_CASES[target, name], target)


@cache
def inspected(target: str, name: str) -> KernelReport:
    """What is in its machine code."""
    return inspect_kernel(compiled(target, name), target)
