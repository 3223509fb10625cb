"""What training a model takes on each device, in bytes, for each optimizer, with ordinary steps and fused ones.

Parameters, gradients and state are those of real optimizers on the meta device; the rest are estimates by formula.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowmem_optim.base import LowMemOptimizer
from lowmem_optim.cli.measure import state_bytes
from lowmem_optim.cli.plan_model import Model, Sizes
from lowmem_optim.cli.plan_scratch import scratch_bytes
from lowmem_optim.cli.registry import Choice
from lowmem_optim.fused_groups import GradientGroups

#: What a row is made of, in the order of tables.
PARTS = ("parameters", "gradients", "state", "temporaries", "activations", "communication")


@dataclass(frozen=True)
class Setting:
    """What is trained how: the batch of one device, tokens of a sequence, and devices with equal models or parts."""

    dtype: torch.dtype
    batch: int
    sequence: int
    checkpointing: bool
    ranks: int = 1
    sharding: str = "none"


@dataclass(frozen=True)
class Row:
    """Bytes on each device.

    mode: "ordinary", or "fused" for the update inside the backward pass.
    gradients: alive at a time.
    temporaries, activations: None where they are not known, for the optimizer or the model; the total then has none.
    """

    optimizer: str
    mode: str
    parameters: int
    gradients: int
    state: int
    temporaries: int | None
    activations: int | None
    communication: int

    @property
    def total(self) -> int:
        """All of it, which is more than the peak where not everything is alive at a time."""
        return sum(getattr(self, part) or 0 for part in PARTS)


class Steps(NamedTuple):
    """Bytes of gradients alive at a time, and of what an update allocates, at most; None where that is not known."""

    gradients: int
    temporaries: int | None


def plan(model: Model, choices: Iterable[Choice], options: dict[str, Any], setting: Setting) -> list[Row]:
    """Returns the rows of all optimizers, from the least total to the largest. Raises ValueError as constructors do."""
    rows = []
    for choice in choices:
        optimizer = choice.construct(model.module, options)
        for mode in ("ordinary", "fused") if isinstance(optimizer, LowMemOptimizer) else ("ordinary",):
            rows.append(_row(model, choice, optimizer, mode, setting))
    return sorted(rows, key=lambda row: row.total)


def _row(model: Model, choice: Choice, optimizer: torch.optim.Optimizer, mode: str, setting: Setting) -> Row:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not isinstance(optimizer, LowMemOptimizer):
        step = _torch_step(choice, optimizer, params)
    elif mode == "fused":
        optimizer.init_state()
        step = fused_step(optimizer, [param for param in model.module.parameters() if param.requires_grad])
    else:
        optimizer.init_state()
        step = ordinary_step(optimizer, params)
    everything = [*model.module.parameters()]
    shared = setting.ranks if setting.sharding == "fsdp2" else 1
    return Row(
        choice.name + ("(fused)" if not choice.can_fuse and "fused" in choice.arguments else ""),
        mode,
        sum(_shard(param, shared) for param in everything),
        sum(_shard(param, shared) for param in params) if mode == "ordinary" else -(-step.gradients // shared),
        _state(optimizer, shared),
        step.temporaries and -(-step.temporaries // shared),
        None if model.sizes is None else activation_bytes(model.sizes, setting),
        _communication(model.module, setting, step.gradients),
    )


def _shard(tensor: Tensor, ranks: int, dim: int = 0) -> int:
    """Bytes of the largest of equal parts along a dimension: of a parameter the first, as FSDP2 cuts."""
    rows = tensor.shape[dim] if tensor.ndim else 1
    return 0 if tensor.numel() == 0 else -(-rows // ranks) * (nbytes(tensor) // rows)


def _state(optimizer: torch.optim.Optimizer, ranks: int) -> int:
    """Bytes of state on a device: parts of those that go along with the dimension that is cut, and all of others."""
    if ranks == 1:
        return state_bytes(optimizer)
    if not isinstance(optimizer, LowMemOptimizer):
        states = (state for of_param in optimizer.state.values() for state in of_param.values())
        return sum(_shard(state, ranks) for state in states if isinstance(state, Tensor))
    total = 0
    for group, place, param, _ in optimizer.members():
        for key, state in optimizer.state[param].items():
            if isinstance(state, Tensor):
                dims = [*optimizer.state_dims(key, param, group, place)] if state.ndim else []
                total += _shard(state, ranks, dims.index(0)) if 0 in dims else nbytes(state)
    return total


# gradients, and what updates allocate


def ordinary_step(optimizer: LowMemOptimizer, params: list[Tensor]) -> Steps:
    """All gradients, and the bucket that allocates most: buckets are updated in turns."""
    grads = [torch.empty_like(param) for param in params]
    known = optimizer.sorted(params, [*grads], optimizer.members, optimizer.state.values, None)
    return Steps(sum(map(nbytes, grads)), _most([scratch_bytes(optimizer, bucket) for bucket in known.buckets]))


def fused_step(optimizer: LowMemOptimizer, params: list[nn.Parameter]) -> Steps:
    """The same of a fused backward pass, in which gradients come in the opposite order of parameters.

    They go through the groups that `fuse_backward` makes; in any order the two largest parameters are the bound.
    """
    groups = GradientGroups(optimizer, alone=False)
    groups.refresh()
    alive = peak = 0
    scratches: list[int | None] = []

    def update(done: list[Tensor]) -> int:
        scratches.extend(scratch_bytes(optimizer, bucket) for bucket in groups.buckets(done))
        for param in done:
            param.grad = None
        return sum(map(nbytes, done))

    for param in reversed(params):
        param.grad = torch.empty_like(param)
        alive += nbytes(param)
        peak = max(peak, alive)
        alive -= update(done) if (done := groups.arrived(param)) else 0
    for done in groups.all_waiting():
        update(done)
    return Steps(peak, _most(scratches))


def _most(scratches: list[int | None]) -> int | None:
    known = [scratch for scratch in scratches if scratch is not None]
    return max(known, default=0) if len(known) == len(scratches) else None


def largest_two(params: Iterable[Tensor]) -> int:
    """Bytes of the two largest parameters, the bound on gradients of a fused backward pass."""
    return sum(sorted(map(nbytes, params))[-2:])


def _torch_step(choice: Choice, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Steps:
    """One of torch's: its state comes with the first step; its foreach form has temporaries as large as parameters."""
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = False  # only for this step, on the meta device
    for param in params:
        param.grad = torch.empty_like(param)
    try:
        optimizer.step()
    except RuntimeError as error:
        raise ValueError(f"{choice.name} cannot be planned: its step reads values, which nothing has here") from error
    finally:
        for param in params:
            param.grad = None
    total = sum(map(nbytes, params))
    return Steps(total, 0 if "fused" in choice.arguments else total)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, on the meta device too."""
    return tensor.numel() * tensor.element_size()


# several devices


def _communication(module: nn.Module, setting: Setting, gradients: int) -> int:
    """Bytes that only exist because there are several devices."""
    if setting.sharding == "none":
        return 0
    if setting.sharding == "ddp":
        return gradients
    root, layer = layer_bytes(module)
    # parameters outside of layers stay gathered, and of layers the one at work and the next; then whole gradients
    return root + 2 * layer + 2 * max(root, layer)


def layer_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes of parameters outside of numbered layers, and of those of the largest layer."""
    layers: dict[str, int] = {}
    root = 0
    for name, param in module.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if number is None:
            root += nbytes(param)
        else:
            key = ".".join(parts[: number + 1])
            layers[key] = layers.get(key, 0) + nbytes(param)
    return root, max(layers.values(), default=0)


# activations


def activation_bytes(sizes: Sizes, setting: Setting) -> int:
    """Bytes that autograd keeps of a transformer for the backward pass, with attention that keeps no square matrix.

    Of each token, with elements of e bytes: of each norm ``hidden (2 e + 4)``, its output, the normalized input and the
    input in float32; of attention ``2 e (queries + keys)``, with norms of heads ``(e + 4) (queries + keys)`` more; of a
    feed-forward layer ``4 e intermediate`` with a gate (its input, its activation, up, their product) and 5 without
    (GELU by tanh, written out), for each expert that sees the token, with its input and output; of the logits
    themselves, and two float32 copies for the loss and its gradient. With checkpointing the inputs of all layers, and
    the rest of one at a time. Dropout is not in it.
    """
    e = setting.dtype.itemsize
    norm = sizes.hidden * (2 * e + 4)
    heads = sizes.queries + sizes.keys
    attention = heads * (2 * e + (e + 4 if sizes.normed_heads else 0))
    inner = (4 if sizes.gated else 5) * e * sizes.intermediate
    forward = sizes.experts * (inner + 2 * e * sizes.hidden) if sizes.experts else inner
    layer = 2 * norm + attention + forward
    kept = layer + sizes.layers * e * sizes.hidden if setting.checkpointing else sizes.layers * layer
    logits = sizes.vocab * (e + 2 * 4)
    return setting.batch * setting.sequence * (kept + norm + logits)
