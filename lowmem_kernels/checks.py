"""What the lists of tensors given to a verb have to satisfy. Every family builds its checks from these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import PARAM_DTYPES, name_of
from .pieces import RowPieces
from .tensors import Gradients, remembered

SCALAR = torch.Size()


def check_list(
    name: str,
    tensors: Sequence[Tensor | None],
    shapes: Sequence[torch.Size | None],
    device: torch.device,
    allowed: Sequence[torch.dtype],
    contiguous: bool = True,
) -> None:
    """Raise ValueError or TypeError unless ``tensors`` have these shapes, this device and one dtype of ``allowed``.

    A shape of None is for an entry that has to be None. The message names the list, the entry, what it is and what is
    allowed.
    """
    if len(tensors) != len(shapes):
        raise ValueError(f"{name} has {len(tensors)} entries; allowed: {len(shapes)}, one for each parameter")
    # once for the whole list first: this runs in every step, and there is something to look for only if it fails
    present = [t for t in tensors if t is not None]
    dtypes = {t.dtype for t in present}
    if (
        len(dtypes) <= 1
        and dtypes <= {*allowed}
        and [None if t is None else t.shape for t in tensors] == shapes
        and {t.device for t in present} <= {device}
        and (not contiguous or all([t.is_contiguous() for t in present]))
    ):
        return
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor is None or shape is None:
            if tensor is not None or shape is not None:
                wanted = "None" if shape is None else f"a tensor of shape {tuple(shape)}"
                raise ValueError(f"{name}[{i}] is {'None' if tensor is None else 'a tensor'}; allowed: {wanted}")
            continue
        if tensor.dtype not in allowed:
            raise TypeError(f"{name}[{i}] is {name_of(tensor.dtype)}; allowed: {', '.join(map(name_of, allowed))}")
        if tensor.dtype is not present[0].dtype:
            first = f"{name}[{next(k for k, t in enumerate(tensors) if t is not None)}]"
            raise TypeError(f"{name}[{i}] is {name_of(tensor.dtype)}; allowed: {name_of(present[0].dtype)}, as {first}")
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}; allowed: {device}, as the first tensor")
        if tensor.shape != shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; allowed: {tuple(shape)}")
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{name}[{i}] is not contiguous; allowed: contiguous tensors")


def check_params(params: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Raise as `check_list` for what all verbs that write parameters have: at least one of each."""
    device = params[0].device
    check_list("params", params, [p.shape for p in params], device, PARAM_DTYPES, contiguous=False)
    check_list("steps", steps, [SCALAR] * len(params), device, (torch.float32,))


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise as `check_list` unless every parameter has a gradient of its shape, as those that autograd made have."""
    # what somebody may have done to them through `.data` shows in size or device
    if isinstance(grads, Gradients) and remembered([params], "places", lambda: _places(params)) == _places(grads):
        return
    shapes = remembered([params], "shapes", lambda: [p.shape for p in params])
    check_list("grads", grads, shapes, params[0].device, PARAM_DTYPES, contiguous=False)


def check_pieces(params: Sequence[Tensor], pieces: RowPieces | None) -> None:
    """Raise ValueError unless every parameter can be some rows of matrices as ``pieces`` says."""
    if pieces is None:
        return
    for name, entries in (("rows", pieces.rows), ("places", pieces.places)):
        if len(entries) != len(params):
            raise ValueError(
                f"pieces.{name} has {len(entries)} entries; allowed: {len(params)}, one for each parameter"
            )
    for i, (param, rows) in enumerate(zip(params, pieces.rows, strict=True)):
        if param.ndim < 2 or param.shape[-2] > rows:
            shape = tuple(param.shape)
            raise ValueError(
                f"params[{i}] has shape {shape} and pieces.rows[{i}] is {rows}; allowed: some rows of those"
            )


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    return [*map(Tensor.numel, tensors)], [*map(Tensor.get_device, tensors)]


def state_dtypes(params: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """Return the dtypes of states as large as the parameter: float32, and bfloat16 where the parameters are.

    float16 is not among them: squares of gradients below 2e-4 would be 0.
    """
    return (torch.float32, torch.bfloat16) if params[0].dtype is torch.bfloat16 else (torch.float32,)
