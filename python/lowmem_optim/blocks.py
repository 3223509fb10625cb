"""What each parameter of a language model is, told by its name and shape, and what moments it gets for that.

A *block* is a parameter, or a slice of one that several matrices share. It is written as a plain tuple, since groups
keep it and checkpoints save it: ``(momentum, second, size, where)``, see `Block`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

#: What a policy may say of a parameter, or of each of its slices.
Momentum = str
MOMENTA = ("none", "lowrank", "full")
Slices = Sequence[tuple[Any, Momentum]]
Policy = Callable[[str, Tensor], Momentum | Slices]
SECOND_MOMENTS = ("adam", "adam-mini", "factored")

#: AdaPM's table, arXiv 2510.09103, with our choice for the last four, which the abstract does not say.
POLICY = {
    "embedding": "none",
    "attention output": "none",
    "query": "lowrank",
    "key": "lowrank",
    "mlp": "lowrank",
    "value": "full",
    "head": "lowrank",
    "bias": "full",
    "vector": "full",
    "unknown": "full",
}

# names of modules, in lower case
_QUERIES = {"q_proj", "wq", "query", "q_lin", "c_q", "q_attn", "to_q"}
_KEYS = {"k_proj", "wk", "key", "k_lin", "c_k", "to_k"}
_VALUES = {"v_proj", "wv", "value", "v_lin", "c_v", "to_v"}
_OUTPUTS = {"o_proj", "out_proj", "out_lin", "to_out"}
_OUTPUTS_IN_ATTENTION = {"wo", "o", "out", "proj", "c_proj", "dense"}
_FUSED_QKV = {"c_attn", "qkv_proj", "qkv", "wqkv", "in_proj_weight"}
_FUSED_GATE_UP = {"gate_up_proj", "gate_up", "gate_and_up", "w12"}
_MLPS = {"fc1", "fc2", "lin1", "lin2", "w1", "w2", "w3", "c_fc", "gate_proj", "up_proj", "down_proj", "fc_in", "fc_out"}
_EMBEDDINGS = {"wte", "wpe", "shared", "relative_attention_bias"}
_HEADS = {"lm_head", "head", "output", "embed_out"}
_IN_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "dense", "experts", "moe", "intermediate")
# of these GPT-2's are stored as (inputs, outputs)
_MAYBE_TRANSPOSED = {"c_attn", "c_proj", "c_fc", "q_attn"}


class Block(NamedTuple):
    """Part of a parameter, and its moments.

    momentum: of MOMENTA.
    second: "element", "rows", "cols" or "factored", as the verb has it.
    size: rows (columns) of a group of "rows" ("cols"); 0: all.
    where: (dimension, start, length) of a slice, or None.
    """

    momentum: str
    second: str
    size: int
    where: tuple[int, int, int] | None


class _Slice(NamedTuple):
    """What is in a slice of a parameter: its kind, its place, and whether its outputs are columns."""

    kind: str
    where: tuple[int, int, int] | None
    transposed: bool


def kind_of(name: str, ndim: int, role: str | None = None) -> str:
    """Return what a parameter is: a key of POLICY, or "query, key, value" or "gate, up" where one holds several.

    ``role`` is what `split_params` says of it, by the types of its modules, which wins.
    """
    *path, last = name.lower().split(".")
    module = last
    if path and last in ("weight", "bias"):
        *path, module = path
    if ndim < 2 or role == "vector":
        return "bias" if "bias" in last else "vector"
    if role in ("embedding", "head"):
        return role
    in_attention = any("attn" in each or "attention" in each for each in path)
    in_mlp = any(each.startswith(_IN_MLP) or each.endswith(_IN_MLP) for each in path)
    if module in _EMBEDDINGS or "embed" in module.removeprefix("embed_out"):
        return "embedding"
    if module in _FUSED_QKV:
        return "query, key, value"
    for kind, names, letter in (("query", _QUERIES, "q"), ("key", _KEYS, "k"), ("value", _VALUES, "v")):
        if module in names or (in_attention and module == letter):
            return kind
    if module in _OUTPUTS or (in_attention and module in _OUTPUTS_IN_ATTENTION):
        return "attention output"
    if module in _FUSED_GATE_UP:
        return "gate, up"
    if in_mlp or module in _MLPS or (module == "dense" and "output" in path):
        return "mlp"
    return "head" if module in _HEADS else "unknown"


class Choice(NamedTuple):
    """What is chosen for a group.

    policy: None: ``momenta`` by kinds. A string: that momentum for all matrices. Or a function, see `AdaPM`.
    momenta: by kinds, as POLICY.
    second_moment: of SECOND_MOMENTS.
    head_dim: rows of a head, or None.
    role: what `split_params` says of the group, or None.
    """

    policy: Policy | str | None
    momenta: Mapping[str, str]
    second_moment: str
    head_dim: int | None
    role: str | None


def blocks_of(names: Sequence[str], params: Sequence[Tensor], choice: Choice) -> tuple[tuple[Block, ...], ...]:
    """Return the blocks of all parameters of a group, of which only the shapes matter; "" is no name.

    Raises ValueError for what a policy may not say.
    """
    transposed = _is_transposed(names, params)
    found = []
    for name, param in zip(names, params, strict=True):
        kind = kind_of(name, param.ndim, choice.role)
        module = name.lower().removesuffix(".weight").rpartition(".")[2]
        slices = _slices_of(kind, param, transposed and module in _MAYBE_TRANSPOSED)
        if choice.policy is None:
            momenta = [choice.momenta[each.kind] for each in slices]
        elif isinstance(choice.policy, str):
            momenta = [_of_matrices(choice.policy, param)]
            slices = [_Slice("unknown" if len(slices) > 1 else slices[0].kind, None, slices[0].transposed)]
        else:
            slices, momenta = _asked(choice.policy, name, param, slices)
        blocks = [_block(momentum, each, param, choice) for momentum, each in zip(momenta, slices, strict=True)]
        if momenta[0] != "lowrank" and len({block[:-1] for block in blocks}) == 1:
            # what is done to all slices alike needs no slices
            blocks = [blocks[0]._replace(where=None)]
        found.append(tuple(blocks))
    return tuple(found)


def _is_transposed(names: Sequence[str], params: Sequence[Tensor]) -> bool:
    """Whether matrices under GPT-2's names are stored as there, which shows in the one that is not square."""
    for name, param in zip(names, params, strict=True):
        if name.lower().endswith("c_attn.weight") and param.ndim == 2:
            return param.shape[1] == 3 * param.shape[0]
    return False


def _slices_of(kind: str, param: Tensor, transposed: bool) -> list[_Slice]:
    """The matrices that a parameter holds, along whichever dimension is large enough for them."""
    if kind not in ("query, key, value", "gate, up"):
        return [_Slice(kind, None, transposed)]
    rows, cols = param.shape[-2:]
    dim = param.ndim - 2 if rows > cols else param.ndim - 1
    long, short = max(rows, cols), min(rows, cols)
    if kind == "gate, up":
        if long % 2:
            return [_Slice("mlp", None, transposed)]
        lengths, kinds = [long // 2] * 2, ["mlp"] * 2
    else:
        # as many queries as there are inputs, and fewer keys and values where groups share them
        if not short < long <= 3 * short or (long - short) % 2:
            return [_Slice("unknown", None, transposed)]
        shared = (long - short) // 2
        lengths, kinds = [short, shared, shared], ["query", "key", "value"]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    is_cols = dim == param.ndim - 1
    return [_Slice(k, (dim, start, length), is_cols) for k, start, length in zip(kinds, starts, lengths, strict=True)]


def _of_matrices(policy: str, param: Tensor) -> str:
    if policy not in MOMENTA:
        raise ValueError(f"policy is {policy!r}; allowed: None, {', '.join(map(repr, MOMENTA))}, or a function")
    return policy if param.ndim >= 2 else "full"


def _asked(policy: Policy, name: str, param: Tensor, slices: list[_Slice]) -> tuple[list[_Slice], list[str]]:
    """What a function says: one momentum for all of a parameter, or one for each slice."""
    answer = policy(name, param)
    asked = f"policy({name!r}, a parameter of shape {tuple(param.shape)})"
    if isinstance(answer, str):
        if answer not in MOMENTA:
            raise ValueError(f"{asked} is {answer!r}; allowed: {', '.join(map(repr, MOMENTA))}, or a list of slices")
        return [_Slice(slices[0].kind if len(slices) == 1 else "unknown", None, slices[0].transposed)], [answer]
    kinds = {each.where: each.kind for each in slices}
    places, momenta = [], []
    for index, momentum in answer:
        if momentum not in MOMENTA:
            raise ValueError(f"{asked} has {momentum!r}; allowed: {', '.join(map(repr, MOMENTA))}")
        places.append(_where(index, param, asked))
        momenta.append(momentum)
    dims = {dim for dim, _, _ in places}
    ends = [0, *(start + length for _, start, length in places)]
    starts = [start for _, start, _ in places]
    if len(dims) != 1 or starts != ends[:-1] or ends[-1] != param.shape[places[0][0]]:
        raise ValueError(f"{asked} has {answer!r}; allowed: slices of one dimension, in order, that cover all of it")
    return [_Slice(kinds.get(w, "unknown"), w, slices[0].transposed) for w in places], momenta


def _where(index: Any, param: Tensor, asked: str) -> tuple[int, int, int]:
    """(dimension, start, length) of a slice of the first dimension, or of a tuple of slices for the first ones."""
    indices = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(each, slice) for each in indices) or len(indices) > param.ndim:
        raise ValueError(f"{asked} has {index!r}; allowed: a slice, or a tuple of slices")
    ranges = [range(*each.indices(size)) for each, size in zip(indices, param.shape, strict=False)]
    cut = [dim for dim, each in enumerate(ranges) if len(each) != param.shape[dim]] or [0]
    dim = cut[0]
    if len(cut) > 1 or ranges[dim].step != 1 or len(ranges[dim]) == 0:
        raise ValueError(f"{asked} has {index!r}; allowed: consecutive elements of one dimension")
    return dim, ranges[dim].start, len(ranges[dim])


def _block(momentum: str, part: _Slice, param: Tensor, choice: Choice) -> Block:
    shape = list(param.shape)
    if part.where is not None:
        dim, _, length = part.where
        shape[dim] = length
    if momentum == "lowrank" and len(shape) not in (2, 3):
        # a convolution, say, is no stack of matrices worth the name
        momentum = "full"
    second = choice.second_moment
    if second == "factored" and len(shape) >= 2:
        return Block(momentum, "factored", 1, part.where)
    if second != "adam-mini" or part.kind == "bias":
        return Block(momentum, "element", 1, part.where)
    if len(shape) < 2 or part.kind == "vector":
        return Block(momentum, "rows", 0, part.where)
    if len(shape) > 3:
        # the first dimension is that of outputs, as in a convolution
        return Block(momentum, "rows", prod(shape[1:-1]), part.where)
    side = shape[-1] if part.transposed else shape[-2]
    head = choice.head_dim
    size = head if part.kind in ("query", "key") and head is not None and side % head == 0 else 1
    return Block(momentum, "cols" if part.transposed else "rows", size, part.where)
