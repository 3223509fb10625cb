"""Which implementation runs: the Triton kernels or the torch reference, chosen at each call from the tensors."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from torch import Tensor

from .numerics import PARAM_DTYPES, name_of
from .ranges import named

BACKENDS = ("auto", "triton", "torch")


def implementation(family: str, backend: str, tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module of ``family`` (a package name) that serves ``tensors``: its ``launch`` or its ``reference``.

    "auto" takes Triton on a GPU and torch elsewhere; the environment variable LOWMEM_BACKEND replaces "auto". Triton is
    imported only once it is chosen. Raises ValueError for an unknown backend, RuntimeError when "triton" cannot serve
    the tensors, with the reason.
    """
    chosen = choose(backend, tensors)
    module: ModuleType = named(importlib.import_module(f"{family}.{'launch' if chosen == 'triton' else 'reference'}"))
    return module


def choose(backend: str, tensors: Sequence[Tensor]) -> str:
    """Return "triton" or "torch" for these tensors; raises as `implementation` does."""
    source = "backend"
    if backend == "auto" and "LOWMEM_BACKEND" in os.environ:
        backend, source = os.environ["LOWMEM_BACKEND"], "the environment variable LOWMEM_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    if backend == "torch" or not tensors:  # with nothing to do, either will do
        return "torch"
    if backend == "auto" and tensors[0].device.type == "cpu":
        return "torch"
    reason = why_not_triton(tensors)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"{source} is 'triton', which cannot be used here: {reason}")
    return "torch" if reason is not None else "triton"


def why_not_triton(tensors: Sequence[Tensor]) -> str | None:
    """Return the reason why the kernels cannot serve these tensors, as a sentence, or None when they can."""
    if not tensors:
        return "there are no tensors."
    device = tensors[0].device
    if not _triton_is_installed():
        return "Triton is not installed (it is published for Linux only)."
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device}, and kernels exist for NVIDIA and AMD GPUs."
    if device.type == "cpu" and not interpreting():
        return (
            "the tensors are on the CPU, where kernels run only in Triton's interpreter "
            "(set TRITON_INTERPRET=1 before Python starts)."
        )
    if device.type == "cuda" and interpreting():
        return "TRITON_INTERPRET is set, and the interpreter cannot follow addresses in GPU memory."
    for tensor in tensors:
        if tensor.dtype not in PARAM_DTYPES:
            allowed = ", ".join(map(name_of, PARAM_DTYPES))
            return f"a tensor has dtype {name_of(tensor.dtype)}; allowed: {allowed}."
    return None


def interpreting() -> bool:
    """Say whether Triton kernels run in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
