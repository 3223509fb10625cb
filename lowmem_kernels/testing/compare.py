"""Comparisons that say by how much two tensors differ, where, and how much was allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import name_of, parity_tolerance

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return, in float64, the distance of neighbours of ``dtype`` in the binade of each value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.double().abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent)


def assert_parity(actual: Tensor, expected: Tensor, start: Tensor, steps: int, name: str = "tensor") -> None:
    """Assert that ``actual`` is within `numerics.parity_tolerance` of ``expected``, ``steps`` steps after ``start``."""
    _assert_same_shape(actual, expected, name)
    difference = actual.double() - expected.double()
    error = torch.linalg.vector_norm(difference).item()
    allowed = parity_tolerance(start, expected, steps)
    if not error <= allowed:
        raise AssertionError(
            f"{name}: |actual - expected| is {error:.4g}, allowed {allowed:.4g} after {steps} steps"
            f" ({error / allowed if allowed else float('inf'):.3g} times); {_worst(difference.abs(), actual, expected)}"
        )


def assert_rounded(
    actual: Tensor, exact: Tensor, error: Tensor | float = 0.0, *, stochastic: bool = False, name: str = "tensor"
) -> None:
    """Assert that each element of ``actual`` is float64 ``exact`` rounded once, after an ``error`` at most as stated.

    Half the distance of two neighbours of ``actual``'s dtype is allowed, the whole distance where rounding is
    stochastic. ``error`` bounds the arithmetic before the rounding, for each element or for all.
    """
    _assert_same_shape(actual, exact, name)
    difference = (actual.double() - exact.double()).abs()
    spacing = ulp(exact.double().abs() + error, actual.dtype)
    excess = difference - error - (spacing if stochastic and actual.dtype is torch.bfloat16 else spacing / 2)
    wrong = ~(excess <= 0)
    if wrong.any():
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {actual.numel()} elements are not {name_of(actual.dtype)} roundings of the "
            f"exact result; {_worst(excess, actual, exact)}, spacing {spacing.flatten()[_argmax(excess)].item():.4g}"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Assert equal shape, dtype and bits: 0.0 differs from -0.0, and every NaN equals every NaN."""
    _assert_same_shape(actual, expected, name)
    if actual.dtype is not expected.dtype:
        raise AssertionError(f"{name}: dtype is {name_of(actual.dtype)}, expected {name_of(expected.dtype)}")
    integer = _INTEGERS[actual.element_size()]
    differs = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    if actual.is_floating_point():
        differs &= ~(actual.isnan() & expected.isnan())
    if differs.any():
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {actual.numel()} elements differ; {_worst(differs, actual, expected)}"
        )


def _assert_same_shape(actual: Tensor, expected: Tensor, name: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}")


def _argmax(badness: Tensor) -> int:
    # NaN is the worst of all
    return int(badness.double().nan_to_num(nan=float("inf")).flatten().argmax())


def _worst(badness: Tensor, actual: Tensor, expected: Tensor) -> str:
    flat = _argmax(badness)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape)) if actual.ndim else ()
    return f"worst at {index}: {actual.flatten()[flat].item()!r}, expected {expected.flatten()[flat].item()!r}"
