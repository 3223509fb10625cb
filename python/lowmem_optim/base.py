"""The optimizer behind all optimizers: the one step loop, state, and what a checkpoint may and may not do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lowmem_kernels import GradTransform, choose
from lowmem_kernels.numerics import PARAM_DTYPES, name_of
from lowmem_kernels.tensors import Gradients

from .buckets import OWN_RULE, Bucket, Known, Member, Part, facts_of, narrow_parts, same_objects
from .checkpoint import Foreign, converted_state, renamed, uid_of
from .checks import COMMON_DEFAULTS, CommonOptions, check_common, check_lr, check_names, check_param
from .clipping import on_device, stats_of_all, with_stats
from .owners import update_on_owners
from .pieces import Dims, dims_by_name, new_pieces, stand_in
from .sharding import check_placements, check_sharding, is_sharded, placing

StateDict = dict[str, Any]


class FusedUpdates(Protocol):
    """What an optimizer has to know of the handle of `fuse_backward`, which updates parameters in its place."""

    def discard_gradients(self) -> None:
        """Make the state of parameters that have a gradient, and drop the gradient: what `step` does meanwhile."""

    def forget(self) -> None:
        """Forget the gradients of micro-batches and of a backward pass that has failed."""

    def watch(self) -> None:
        """See to parameters that are new."""


class LowMemOptimizer(Optimizer):
    """Base class: a subclass says what its options may be, what state a parameter has, and what one update is.

    It implements `check_options`, `new_state` and `update`, and passes its own options and the common ones to
    ``__init__``. Everything else is here: groups, buckets, device scalars, non-finite gradients, checkpoints.
    """

    # GradScaler then sets `grad_scale` and `found_inf` and leaves unscaling to the kernels
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, params: ParamsT, own: dict[str, Any], common: CommonOptions) -> None:
        check_names(common, {*own, *self.common_defaults}, unknown_is_error=True)
        defaults = {**own, **self.common_defaults, **common}
        self._check(defaults)
        self._nonfinite: dict[torch.device, Tensor] = {}
        self._known: Known | None = None
        self.fused: FusedUpdates | None = None
        super().__init__(params, defaults)

    # what a subclass says

    #: the options that a constructor takes as ``**options``
    common_defaults: ClassVar[Mapping[str, Any]] = COMMON_DEFAULTS

    #: how checkpoints of other optimizers load
    foreign = Foreign()

    def check_lr(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError when lr is not allowed; None is, where an optimizer that makes its own rate says so here."""
        check_lr(options["lr"])

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError when an option of this optimizer has a value that is not allowed."""
        raise NotImplementedError

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for a parameter that cannot be optimized with the options of its group."""
        check_param(param, group)
        check_sharding(param)

    def rule_of(self, param: Tensor, group: Mapping[str, Any]) -> str:
        """Return which of the optimizer's rules, if it has several, updates a parameter; those of a bucket have one."""
        return OWN_RULE

    def parts_of(self, param: Tensor, group: Mapping[str, Any], place: int) -> Sequence[Part]:
        """Return what is updated by itself of the parameter at a place of its group: all of it, unless a subclass."""
        return (Part(self.rule_of(param, group)),)

    def state_of(self, param: Tensor, group: Mapping[str, Any], place: int) -> dict[str, Tensor]:
        """Return `new_state` of the parameter at a place of its group, for a subclass whose parameters differ."""
        return self.new_state(param, group)

    def complete_group(self, group: dict[str, Any]) -> None:
        """Add to a new group what an optimizer keeps there besides options."""

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state tensors of a parameter before its first update, apart from ``step``."""
        raise NotImplementedError

    def state_dims(self, key: str, param: Tensor, group: Mapping[str, Any], place: int) -> Dims:
        """Return how a state goes along with its parameter where that is a DTensor."""
        return dims_by_name(key, param.ndim)

    def start_of(self, key: str, shape: torch.Size) -> Tensor | None:
        """Return what a state of this shape starts with, where it is not zeros."""
        return None

    def takes_pieces(self, bucket: Bucket) -> bool:
        """Say whether `update` takes pieces of parameters; if not, it gets the wholes, each in one process."""
        return False

    def begin_step(self, buckets: list[Bucket]) -> None:
        """Do what is done once in a step for each group, of which these are the first buckets to be updated."""

    def update(self, bucket: Bucket) -> None:
        """Update the bucket's parameters and states, in place, once."""
        raise NotImplementedError

    # the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return what ``closure``, which recomputes the loss, returns.

        After `fuse_backward` the backward pass updates parameters, in the closure too, and this changes none.

        Raises RuntimeError for sparse gradients and for backend="triton" where it cannot run, and TypeError for dtypes
        that a parameter may not have, before any update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fused is not None:
            self.fused.discard_gradients()
            return loss
        buckets = self._buckets()
        try:
            self._set_transforms(buckets)
            self.begin_step(buckets)
            for bucket in buckets:
                self.update_everywhere(bucket)
        finally:
            for bucket in buckets:
                bucket.grads = Gradients()  # buckets outlive the step, gradients need not
        return loss

    def update_everywhere(self, bucket: Bucket) -> None:
        """Update a bucket, also where its parameters are in pieces."""
        if bucket.in_pieces and not self.takes_pieces(bucket):
            update_on_owners(bucket, self.update)
        else:
            self.update(bucket)
        # autograd sees no writes to what a DTensor has here
        torch.autograd.graph.increment_version(bucket.wholes)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, as torch.optim.Optimizer does; after `fuse_backward` those of micro-batches, too."""
        if self.fused is not None:
            self.fused.forget()
        super().zero_grad(set_to_none)

    def _buckets(self) -> list[Bucket]:
        """What has a gradient, sorted into buckets: those of the last step if nothing but gradients is new."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        self._known = self.sorted(params, grads, self.members, self.state.values, self._known)
        return self._known.buckets

    def sorted(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        members: Callable[[], Iterable[Member]],
        states: Callable[[], Iterable[object]],
        known: Known | None,
    ) -> Known:
        """Sort parameters that have a gradient into buckets: those of ``known`` if nothing but gradients is new.

        ``members`` are the parameters with what there is to know of each, ``states`` their states, as they are now.
        """
        # what a bucket depends on. Tensors and states are compared by identity
        objects = [*params, *self.param_groups, *states()]
        facts, local_grads = facts_of(self.param_groups, params, grads)
        if known is None or known.facts != facts or not same_objects(known.objects, objects):
            buckets, places = self._make_buckets(members(), grads)
            # states may have been made just now
            objects = [*params, *self.param_groups, *states()]
            known = Known(objects, facts, buckets, places)
        for bucket, where in zip(known.buckets, known.places, strict=True):
            bucket.take([local_grads[i] for i in where])  # type: ignore[misc]
            bucket.notice()
        return known

    def _make_buckets(
        self, all_members: Iterable[Member], grads: list[Tensor | None]
    ) -> tuple[list[Bucket], list[list[int]]]:
        """Buckets, and the places of their parameters among all. All gradients are checked before any state is made."""
        found, checked = [], set()
        for position, (member, grad) in enumerate(zip(all_members, grads, strict=True)):
            if grad is not None:
                group, param = member.group, member.param
                for part in self.parts_of(param, group, member.place):
                    where = (param.device, placing(param), placing(grad), param.ndim if is_sharded(param) else None)
                    kind = (id(group), part.rule, *where, param.dtype, grad.dtype, grad.layout)
                    if kind not in checked:
                        self._check_gradient(group, param, grad, member.identity)
                        checked.add(kind)
                    found.append((kind, part, member, position))
        members: dict[tuple[Any, ...], list[tuple[dict[str, Any], Tensor, dict[str, Any], Part, int]]] = {}
        for kind, part, member, position in found:
            state = self.state[member.param] or self.make_state(member)
            # a loaded checkpoint may have state of another dtype than a new parameter's
            one = (member.group, member.param, state, part, position)
            members.setdefault((kind, *narrow_parts(state)), []).append(one)
        buckets, places = [], []
        for each in members.values():
            groups, params, states, parts, positions = zip(*each, strict=True)
            buckets.append(Bucket(groups[0], params, states, parts))
            places.append(list(positions))
        return buckets, places

    def _check_gradient(self, group: dict[str, Any], param: Tensor, grad: Tensor, identity: str | int) -> None:
        """Raise what an update would raise after others have been made; dtypes may have changed since construction."""
        if grad.layout is not torch.strided:
            raise RuntimeError(f"the gradient of {identity!r} is {grad.layout}; allowed: dense gradients")
        self.check_param(param, group)
        check_placements(param, grad, identity)
        if grad.dtype not in PARAM_DTYPES:
            allowed = ", ".join(map(name_of, PARAM_DTYPES))
            raise TypeError(f"the gradient of {identity!r} is {name_of(grad.dtype)}; allowed: {allowed}")
        choose(group["backend"], (param, grad))

    def _set_transforms(self, buckets: list[Bucket]) -> None:
        """Give every bucket its GradTransform, without waiting for the device."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inv_scale = None if grad_scale is None else grad_scale.float().reciprocal()
        stats, found_inf = stats_of_all(self.param_groups, buckets, found_inf)
        if stats is not None:
            self.count_nonfinite(stats)
        for bucket in buckets:
            bucket.transform = self.transform_of(bucket, inv_scale, found_inf)
            if stats is not None:
                group, here = bucket.group, stats.to(bucket.device, non_blocking=True)
                bucket.transform = with_stats(bucket.transform, group, group.get("clip_grad_norm"), here)

    def transform_of(self, bucket: Bucket, inv_scale: Tensor | None, found_inf: Tensor | None) -> GradTransform:
        """Return how gradients of a bucket are read, by the options of its group."""
        group, device = bucket.group, bucket.device
        return GradTransform(
            inv_scale=on_device(device, inv_scale),
            clip_value=group.get("clip_grad_value"),
            maximize=group["maximize"],
            found_inf=on_device(device, found_inf),
            skip_nonfinite=group["skip_nonfinite"] == "tensor",
            skipped=self._nonfinite_on(device),
        )

    def count_nonfinite(self, stats: Tensor) -> None:
        """Count the NaN and Inf that `grad_stats` has found, unless no group skips for them."""
        if any(group["skip_nonfinite"] for group in self.param_groups):
            self._nonfinite_on(stats.device).add_(stats[1].long())

    def nonfinite_count(self) -> int:
        """Return how many elements, or for factored rules parameters, NaN and Inf kept still. Waits for the device."""
        return sum(int(count) for count in self._nonfinite.values())

    def _nonfinite_on(self, device: torch.device) -> Tensor:
        if device not in self._nonfinite:
            self._nonfinite[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._nonfinite[device]

    # parameters and their state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch.optim.Optimizer does.

        Unknown keys are kept, since schedulers and trainers add their own, but one that looks like a misspelled option
        raises TypeError. Bad values and parameters raise ValueError or TypeError. The optimizer then stays as it was.
        """
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        group = self.param_groups[-1]
        try:
            check_names(group, self.defaults, unknown_is_error=False)
            self._check(group)
            self.complete_group(group)
            for param in group["params"]:
                self.check_param(param, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        _place_lr(group)
        if self.fused is not None:
            self.fused.watch()

    def _check(self, options: Mapping[str, Any]) -> None:
        self.check_lr(options)
        check_common(options)
        self.check_options(options)

    def init_state(self) -> None:
        """Create the state of every parameter now instead of at its first gradient; on the meta device too."""
        for member in self.members():
            if not self.state[member.param]:
                self.make_state(member)

    def members(self) -> Iterator[Member]:
        """All parameters, in order."""
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                yield Member(group, i, param, names[i] if names else position)
                position += 1

    def make_state(self, member: Member) -> dict[str, Any]:
        """Make, keep and return the state of a parameter that has none."""
        state: dict[str, Any] = self.state[member.param]
        state["step"] = torch.zeros((), dtype=torch.float32, device=member.param.device)
        state["uid"] = uid_of(member.identity)
        group, place, param, _ = member
        if is_sharded(param):
            expected = self.state_of(stand_in(param), group, place)
            dims_of = partial(self.state_dims, param=param, group=group, place=place)
            state.update(new_pieces(expected, param, dims_of, self.start_of))
        else:
            state.update(self.state_of(param, group, place))
        return state

    # checkpoints

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_nonfinite", {})
        self.__dict__.setdefault("fused", None)
        self._known = None
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            _place_lr(group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned, here or by another optimizer with the same names or those in `foreign`.

        Unlike torch.optim, state is never cast down to the parameters' dtype, and options that the checkpoint does not
        have keep their defaults. Raises ValueError, with nothing changed, where states do not fit the parameters.
        """
        states: dict[Tensor, dict[str, Any]] = {}

        def take(_: Optimizer, incoming: StateDict) -> StateDict:
            """Runs after the user's pre-hooks: convert all states, and leave torch none to cast."""
            saved_groups = [dict(self.foreign.options(group, self.defaults)) for group in incoming["param_groups"]]
            # the options that will be in force, which also say what state there is
            in_force = [
                {**group, **self.defaults, **saved}
                for group, saved in zip(self.param_groups, saved_groups, strict=False)
            ]
            for options in in_force:
                self._check(options)
            saved_params = ((saved_id, options) for options in in_force for saved_id in options["params"])
            for (saved_id, options), member in zip(saved_params, self.members(), strict=False):
                if saved_id in incoming["state"]:
                    param, place = member.param, member.place
                    expected = self.state_of(stand_in(param), options, place)
                    saved = renamed(incoming["state"][saved_id], self.foreign.states, expected)
                    dims_of = partial(self.state_dims, param=param, group=options, place=place)
                    states[param] = converted_state(saved, expected, param, member.identity, dims_of)
            return {**incoming, "param_groups": saved_groups, "state": {}}

        def put(_: Optimizer) -> None:
            """Runs before the user's post-hooks."""
            self.state.update(states)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _place_lr(group: dict[str, Any]) -> None:
    """Where capturable, put lr into a tensor beside the parameters, which a captured graph reads at each replay."""
    if group["capturable"] and group["lr"] is not None:
        device = next((param.device for param in group["params"]), None)
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
