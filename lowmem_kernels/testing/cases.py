"""Tensors that find mistakes: ugly shapes and layouts in every dtype, and the bytes that a step over them must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import PARAM_DTYPES

#: Parameter and gradient dtypes to try.
DTYPES = PARAM_DTYPES


@dataclass(frozen=True)
class Case:
    """A parameter and its gradient: name, shape, and how the elements of each lie in memory (see `lay_out`)."""

    name: str
    shape: tuple[int, ...]
    param_layout: str = "contiguous"
    grad_layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Precision:
    """Dtypes of one run: parameters, gradients, states, and whether bfloat16 is rounded stochastically."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    stochastic: bool = False

    def __str__(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        rounding = "-sr" if self.stochastic else ""
        return f"p_{names[self.param]}-g_{names[self.grad]}-s_{names[self.state]}{rounding}"


#: Combinations that the verbs allow; gradients in another dtype than the parameters occur with fp32 accumulation.
PRECISIONS = [
    Precision(torch.float32, torch.float32, torch.float32),
    Precision(torch.float32, torch.bfloat16, torch.float32),
    Precision(torch.float16, torch.float16, torch.float32),
    Precision(torch.bfloat16, torch.bfloat16, torch.float32),
    Precision(torch.bfloat16, torch.bfloat16, torch.float32, stochastic=True),
    Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    Precision(torch.bfloat16, torch.float32, torch.bfloat16, stochastic=True),
]

#: The elementwise plans cut at 256 (block of strided layouts), 512 (misaligned), 1024 (aligned) and 2048 elements
#: (tile), and aligned tensors end in a vector of eight: sizes lie on both sides of each.
SHAPES = [
    Case("scalar", ()),
    Case("one", (1,)),
    Case("seven", (7,)),
    Case("eight", (8,)),
    Case("empty", (0, 3)),
    Case("row", (1, 515)),
    Case("column", (515, 1)),
    Case("odd_matrix", (37, 29)),
    Case("not_16", (24, 43)),
    Case("block_less_1", (1023,)),
    Case("block", (1024,)),
    Case("block_plus_1", (1025,)),
    Case("tile_less_1", (23, 89)),
    Case("tile", (32, 64)),
    Case("tile_plus_1", (3, 683)),
    Case("three_tiles_less_1", (6143,)),
    Case("four_tiles", (64, 127)),
    Case("conv", (6, 5, 3, 3)),
    Case("conv_channels_last", (6, 5, 3, 3), "channels_last", "channels_last"),
    Case("conv_grad_channels_last", (4, 7, 3, 3), "contiguous", "channels_last"),
    Case("experts", (3, 11, 23)),
    Case("experts_transposed", (3, 11, 23), "transposed", "transposed"),
    Case("transposed", (32, 16), "transposed", "transposed"),
    Case("transposed_param", (27, 19), "transposed", "contiguous"),
    Case("transposed_grad_tile_plus_1", (3, 683), "contiguous", "transposed"),
    Case("misaligned", (511,), "misaligned", "misaligned"),
    Case("misaligned_block_plus_1", (27, 19), "misaligned", "misaligned"),
    Case("misaligned_grad_tile_plus_1", (3, 683), "contiguous", "misaligned"),
    Case("columns_of_wider", (15, 17), "columns", "columns"),
    Case("reversed_dims", (3, 5, 2, 3, 7), "reversed", "contiguous"),
    Case("expanded_grad", (17, 26), "contiguous", "expanded"),
]


def make_tensors(
    case: Case, dtype: torch.dtype, seed: int, *, grad_dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return (parameter, gradient) of a case; the same arguments give the same values.

    Magnitudes are those of a language model: parameters of 0.02, gradients of 1e-3 with a heavy tail, some exact zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    param = 0.02 * torch.randn(case.shape, generator=generator)
    grad = 1e-3 * torch.randn(case.shape, generator=generator) * torch.randn(case.shape, generator=generator).exp()
    grad = torch.where(torch.rand(case.shape, generator=generator) < 0.02, 0.0, grad)
    return (
        lay_out(param.to(device, dtype), case.param_layout),
        lay_out(grad.to(device, grad_dtype or dtype), case.grad_layout),
    )


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return contiguous ``values`` in another place in memory.

    "transposed" swaps the last two dimensions in memory, "reversed" all; "misaligned" starts one element after an
    aligned address; "columns" is part of a matrix three elements wider; "expanded" repeats the values of the last
    dimension's first element by a stride of 0.
    """
    if layout == "contiguous":
        return values
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "reversed":
        dims = tuple(reversed(range(values.ndim)))
        return values.permute(dims).contiguous().permute(dims)
    if layout == "misaligned":
        return values.new_zeros(values.numel() + 1)[1:].view(values.shape).copy_(values)
    if layout == "columns":
        return values.new_zeros(*values.shape[:-1], values.shape[-1] + 3)[..., : values.shape[-1]].copy_(values)
    if layout == "expanded":
        return values[..., :1].clone().expand(values.shape)
    raise ValueError(f"layout is {layout!r}; allowed: contiguous, channels_last, or those in the docstring")


def bytes_moved(rule: str, numel: int, param_itemsize: int, state_itemsize: int = 0) -> tuple[int, int]:
    """Return the (read, written) bytes that one call of a verb requests for ``numel`` elements, tables not included.

    Gradients have the parameters' itemsize e, states have s: "adamw" reads 2e + 2s and writes e + 2s for each element,
    "scaled_update" reads 2e and writes e, "grad_stats" reads e.

    Of matrices, factors and partial sums not included, with s = 0 where there is no momentum: "factored" reads g three
    times, of which the second is served by a cache, and p and m once; "factored_scaled" has to read p for its RMS,
    "factored_floor" g because the floor under V is felt; "confidence" reads m twice, and writes it before p.

    Multi-normalization of matrices: "sinkgd" reads g six times (five pairs of norms), "sinkgd_once" twice (one pair),
    "one_sided" once, where lines are what lies in one piece; "table" (five pairs and a row, a threshold and a momentum)
    reads g and m seven times; "held" is any of them for a matrix that one program holds, and reads each once.

    Partial momentum, factors and sums not included: "lowrank" reads g three times and v once, "lowrank_rows" has no v
    of the matrix's size, "lowrank_rms" reads g and v once more for the clip; "no_momentum" reads g and v once;
    "adam_mini" reads g twice, where v is of single rows the second time from a cache, and m once.

    "apollo" reads g twice, of ranks up to 256; moments and what is projected are not included.

    Of vectors, whose V is kept in full: "factored_vector" and "confidence_vector" read g and V twice.
    """
    e, s = param_itemsize, state_itemsize
    formulas = {
        "adamw": (2 * e + 2 * s, e + 2 * s),
        "scaled_update": (2 * e, e),
        "grad_stats": (e, 0),
        "factored": (4 * e + s, e + s),
        "factored_scaled": (5 * e + s, e + s),
        "factored_floor": (5 * e + s, e + s),
        "confidence": (4 * e + 2 * s, e + s),
        "sinkgd": (7 * e, e),
        "sinkgd_once": (3 * e, e),
        "one_sided": (2 * e, e),
        "table": (8 * e + 7 * s, e + s),
        "apollo": (3 * e, e),
        "held": (2 * e + s, e + s),
        "lowrank": (4 * e + 4, e + 4),
        "lowrank_rows": (4 * e, e),
        "lowrank_rms": (5 * e + 8, e + 4),
        "no_momentum": (2 * e + 4, e + 4),
        "adam_mini": (3 * e + s, e + s),
        "factored_vector": (3 * e + s + 8, e + s + 4),
        "confidence_vector": (3 * e + 2 * s + 8, e + s + 4),
    }
    if rule not in formulas:
        raise ValueError(f"rule is {rule!r}; allowed: {', '.join(map(repr, formulas))}")
    read, written = formulas[rule]
    return read * numel, written * numel


def moment_bytes(channels: int, contracted: int, rank: int, param_itemsize: int) -> tuple[int, int]:
    """Return the (read, written) bytes of APOLLO's moments, float32, of one matrix beside those of "apollo".

    Where nothing is projected, g is read once more for them.
    """
    moments = 8 * min(rank, contracted) * channels
    again = 0 if rank < contracted else param_itemsize * channels * contracted
    return moments + again, moments


def cached_bytes(rule: str, numel: int, param_itemsize: int) -> int:
    """Return how many of the bytes that `bytes_moved` says are read a second time at once, which a cache can serve.

    They are the second sweep over a block of rows of g, which no larger part of g comes between.
    """
    swept_twice = ("factored", "factored_scaled", "factored_floor", "confidence", "adam_mini")
    return param_itemsize * numel if rule in swept_twice else 0
