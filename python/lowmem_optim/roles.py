"""Which parameter of a model plays which role, found by the types of its modules, as groups that can be printed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

ROLES = ("matrix", "embedding", "head", "vector")

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class Assignment(NamedTuple):
    """The role of one parameter, and why it has it."""

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """Groups that any torch optimizer takes, one for each role that occurs; printed, a table of all parameters.

    A group has ``params``, ``param_names`` and ``role``, to which options can be added. ``assignments`` is the table.
    """

    def __init__(self, groups: list[dict[str, Any]], assignments: list[Assignment]) -> None:
        super().__init__(groups)
        self.assignments = assignments

    def __str__(self) -> str:
        """Return a line for each parameter: name, shape, role, reason."""
        header = Assignment._fields
        lines = [header, *((a.name, _by("x", a.shape), a.role, a.reason) for a in self.assignments)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join(padded)


class _Owner(NamedTuple):
    """A module that has a parameter, and the parameter's name there."""

    name: str
    module: nn.Module


def split_params(model: nn.Module, roles: Mapping[str, str] | None = None) -> ParamGroups:
    """Return the trainable parameters of a model in groups, one for each role that occurs.

    - "embedding": the weight of an nn.Embedding or nn.EmbeddingBag, also where the output layer shares it.
    - "head": the weight of ``get_output_embeddings()``, where a module has that method, as those of transformers do;
      else that of the last linear layer, if it has as many outputs as an embedding has rows.
    - "vector": all of fewer than two dimensions, and the parameters of normalization layers.
    - "matrix": the rest, of two or more dimensions.

    Parameters that do not require a gradient are left out, and one that has several names comes once, under the first.

    Args:
        model: any module.
        roles: {pattern: role} for names of parameters, as in ``{"*.router.weight": "vector"}``, with the wildcards of
            fnmatch. They win over the types; of several patterns that match, the last one does.

    Raises:
        ValueError: a role that does not exist or does not fit the shape, a pattern that matches no parameter.
    """
    owners = _owners(model)
    overrides = _overrides(roles or {}, owners)
    head = _head_weight(model)
    assignments: list[Assignment] = []
    members: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in ROLES}
    for param, where in owners.items():
        if not param.requires_grad:
            continue
        role, reason = overrides.get(param) or _found(param, where, is_head=param is head)
        name = where[0].name
        if role != "vector" and param.ndim < 2:
            raise ValueError(f"{reason} is {role!r} for {name}, of shape {tuple(param.shape)}; allowed: 'vector'")
        assignments.append(Assignment(name, tuple(param.shape), role, reason))
        members[role].append((name, param))
    groups = [
        {"params": [param for _, param in each], "param_names": [name for name, _ in each], "role": role}
        for role, each in members.items()
        if each
    ]
    return ParamGroups(groups, assignments)


def _owners(model: nn.Module) -> dict[Tensor, list[_Owner]]:
    """All parameters in the order of the model, each with all modules that have it."""
    owners: dict[Tensor, list[_Owner]] = {}
    for prefix, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            owners.setdefault(param, []).append(_Owner(f"{prefix}.{key}" if prefix else key, module))
    return owners


def _overrides(roles: Mapping[str, str], owners: Mapping[Tensor, list[_Owner]]) -> dict[Tensor, tuple[str, str]]:
    """{parameter: (role, reason)} of those that a pattern matches by any of their names."""
    found = {}
    for pattern, role in roles.items():
        reason = f"roles[{pattern!r}]"
        if role not in ROLES:
            raise ValueError(f"{reason} is {role!r}; allowed: {', '.join(map(repr, ROLES))}")
        matching = [p for p, where in owners.items() if any(fnmatchcase(owner.name, pattern) for owner in where)]
        if not matching:
            names = [owner.name for where in owners.values() for owner in where]
            near = difflib.get_close_matches(pattern, names, n=3) or names[:3]
            raise ValueError(f"roles has {pattern!r}, which matches no parameter; allowed: such as {', '.join(near)}")
        found.update(dict.fromkeys(matching, (role, reason)))
    return found


def _found(param: Tensor, where: list[_Owner], *, is_head: bool) -> tuple[str, str]:
    """The role that the modules say, and the reason."""
    kinds = [type(owner.module).__name__ for owner in where]
    if param.ndim < 2:
        return "vector", f"{kinds[0]}, {param.ndim}-D"
    for i, (owner, kind) in enumerate(zip(where, kinds, strict=True)):
        if isinstance(owner.module, nn.Embedding | nn.EmbeddingBag):
            others = [other.name for j, other in enumerate(where) if j != i]
            return "embedding", f"{kind}, tied to {', '.join(others)}" if others else kind
        if isinstance(owner.module, NORMS):
            return "vector", kind
    if is_head:
        return "head", f"{kinds[0]}, output layer"
    return "matrix", kinds[0]


def _head_weight(model: nn.Module) -> Tensor | None:
    """The weight of the output layer, where there is one that can be told."""
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        layer = find() if callable(find) else None
        if layer is not None:
            return getattr(layer, "weight", None)
    layers = list(_linear_layers(model))
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return layers[-1][0].weight if layers and layers[-1][1] in rows else None


def _linear_layers(model: nn.Module) -> Iterator[tuple[Any, int]]:
    """Linear layers in the order of the model, each with the number of its outputs."""
    for module in model.modules():
        # nf: of Conv1D of transformers, a linear layer whose weight is transposed
        width = module.out_features if isinstance(module, nn.Linear) else getattr(module, "nf", None)
        if isinstance(width, int):
            yield module, width


def _by(sign: str, sizes: tuple[int, ...]) -> str:
    return f" {sign} ".join(map(str, sizes)) or "scalar"
