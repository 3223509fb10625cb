"""Probes of the state: its dtypes and bytes, saving and loading it, and whether runs repeat."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from lowmem_kernels.numerics import name_of

from .inputs import gradients, same_bits, starts
from .recognize import Recognition
from .subject import Subject
from .verdict import Verdict

#: Of this size are matrices whose state is counted: factors then show as a few hundredths of a byte.
SIDE = 256


def _tensors(state: Any) -> dict[str, Tensor]:
    """The tensors of a parameter's state by key."""
    return {key: v for key, v in dict(state).items() if isinstance(v, Tensor)}


def _arrays(state: Any) -> dict[str, Tensor]:
    """Those that are no single numbers, such as a step."""
    return {key: v for key, v in _tensors(state).items() if v.ndim > 0}


def state(subject: Subject, found: Recognition) -> Verdict:
    """Dtype and size of the state of bfloat16 parameters."""
    shapes = ((SIDE, SIDE), (SIDE,)) if subject.takes_vectors else ((SIDE, SIDE),)
    params, optimizer = subject.run(starts(*shapes), gradients(*shapes, steps=1), torch.bfloat16)
    states = [_arrays(optimizer.state.get(p, {})) for p in params]
    dtypes = " and ".join(sorted({name_of(v.dtype) for each in states for v in each.values()}))
    sizes = [sum(v.numel() * v.element_size() for v in each.values()) for each in states]
    each = {kind: size / p.numel() for kind, size, p in zip(("matrix", "vector"), sizes, params, strict=False)}
    figures = {f"bytes per parameter, {kind}": size for kind, size in each.items()}
    if not any(states):
        return Verdict("state of bfloat16", "none", "It has no state.", figures=figures)
    what = ", ".join(f"{size:.3g} bytes for each element of a {kind}" for kind, size in each.items())
    finding = f"{dtypes}, {' and '.join(f'{size:.3g}' for size in each.values())} bytes"
    return Verdict(
        "state of bfloat16",
        finding,
        f"The state of bfloat16 parameters is {dtypes}: {what} (of side {SIDE}).",
        figures=figures,
    )


def loading(subject: Subject, found: Recognition) -> Verdict:
    """Whether load_state_dict keeps the dtypes of the state of bfloat16 parameters."""
    params, optimizer = subject.run(starts(*subject.shapes), gradients(*subject.shapes, steps=1), torch.bfloat16)
    other = subject.make(params)
    other.load_state_dict(optimizer.state_dict())
    cast: dict[str, str] = {}
    for param in params:
        before, after = (
            {k: name_of(v.dtype) for k, v in _tensors(each.state.get(param, {})).items()} for each in (optimizer, other)
        )
        cast |= {
            key: f"{key} from {before[key]} to {after.get(key, 'nothing')}"
            for key in before
            if before[key] != after.get(key)
        }
    if cast:
        finding = "cast" if all("nothing" not in each for each in cast.values()) else "lost"
        return Verdict("load_state_dict", finding, f"load_state_dict turns {', '.join(cast.values())}.", True)
    return Verdict("load_state_dict", "keeps dtypes", "load_state_dict keeps the state's dtypes.")


def determinism(subject: Subject, found: Recognition) -> Verdict:
    """Two runs with the same seed of torch, and one with another."""
    same, seedless = True, True
    for dtype in (torch.float32, torch.bfloat16):
        first, second, other = (_seeded(subject, dtype, seed) for seed in (0, 0, 1))
        same &= all(same_bits(a, b) for a, b in zip(first, second, strict=True))
        seedless &= all(same_bits(a, b) for a, b in zip(first, other, strict=True))
    if not same:
        return Verdict("two runs", "differ", "Two runs with the same seed differ.", True)
    more = "" if seedless else ", given the same seed of torch: it draws from the global random numbers"
    return Verdict(
        "two runs", "same bits" if seedless else "same bits if seeded", f"Two runs have the same bits{more}."
    )


def _seeded(subject: Subject, dtype: torch.dtype, seed: int) -> list[torch.nn.Parameter]:
    params = subject.params(starts(*subject.shapes), dtype)
    optimizer = subject.make(params)
    torch.manual_seed(seed)
    subject.steps(optimizer, params, gradients(*subject.shapes, steps=4))
    return params


def resuming(subject: Subject, found: Recognition) -> Verdict:
    """Two steps, a checkpoint by torch.save and torch.load(weights_only=True), and two more, against four."""
    differing = []
    for dtype in (torch.float32, torch.bfloat16):
        grads = gradients(*subject.shapes, steps=4)
        # steps so large that bfloat16 does not hide a state that was rounded
        params, optimizer = subject.run(starts(*subject.shapes), grads[:2], dtype, lr=0.5)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        try:
            saved = torch.load(file, weights_only=True)
        except pickle.UnpicklingError:
            says = "torch.load(weights_only=True) refuses its checkpoint, which holds more than tensors and numbers"
            return Verdict("resuming", "checkpoint refused", f"{says}.", True)
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = subject.make(again, lr=0.5)
        resumed.load_state_dict(saved)
        for each, of in ((optimizer, params), (resumed, again)):
            torch.manual_seed(0)
            subject.steps(each, of, grads[2:])
        if not all(same_bits(a, b) for a, b in zip(params, again, strict=True)):
            differing.append(name_of(dtype))
    if differing:
        what = " and ".join(differing)
        return Verdict(
            "resuming", f"differs in {what}", f"A resumed run differs from one that goes on, in {what}.", True
        )
    return Verdict(
        "resuming", "same bits", "A resumed run has the bits of one that goes on; weights_only=True loads it."
    )
