"""The optimizer behind all optimizers: the one step loop, state, and what a checkpoint may and may not do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lowmem_kernels import GradTransform, choose
from lowmem_kernels.elementwise import grad_stats
from lowmem_kernels.numerics import PARAM_DTYPES, name_of
from lowmem_kernels.tensors import Gradients

from .buckets import OWN_RULE, Bucket, Part
from .checkpoint import Foreign, converted_state, renamed, uid_of
from .checks import COMMON_DEFAULTS, CommonOptions, check_common, check_lr, check_names, check_param

StateDict = dict[str, Any]


class _Known(NamedTuple):
    """The buckets of the last step, and what they depend on."""

    objects: list[object]
    facts: tuple[list[Any], ...]
    buckets: list[Bucket]
    places: list[list[int]]


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
        self._known: _Known | None = None
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

        Raises RuntimeError for sparse gradients and for backend="triton" where it cannot run, and TypeError for dtypes
        that a parameter may not have, before any update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = self._buckets()
        try:
            self._set_transforms(buckets)
            for bucket in buckets:
                self.update(bucket)
        finally:
            for bucket in buckets:
                bucket.grads = Gradients()  # buckets outlive the step, gradients need not
        return loss

    def _buckets(self) -> list[Bucket]:
        """What has a gradient, sorted into buckets: those of the last step if nothing but gradients is new."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        # what a bucket depends on. Tensors and states are compared by identity
        objects = [*params, *self.param_groups, *self.state.values()]
        facts = (
            [len(group["params"]) for group in self.param_groups],
            [*map(Tensor.data_ptr, params)],
            [param.dtype for param in params],
            [None if grad is None else grad.dtype for grad in grads],
            [None if grad is None else grad.layout for grad in grads],
        )
        known = self._known
        if known is None or known.facts != facts or not _same_objects(known.objects, objects):
            buckets, places = self._make_buckets()
            # states may have been made just now
            objects = [*params, *self.param_groups, *self.state.values()]
            known = self._known = _Known(objects, facts, buckets, places)
        for bucket, where in zip(known.buckets, known.places, strict=True):
            bucket.take([grads[i] for i in where])
            bucket.notice()
        return known.buckets

    def _make_buckets(self) -> tuple[list[Bucket], list[list[int]]]:
        """Buckets, and the places of their parameters among all. All gradients are checked before any state is made."""
        found, checked = [], set()
        for position, (group, place, param, identity) in enumerate(self._parameters()):
            grad = param.grad
            if grad is not None:
                for part in self.parts_of(param, group, place):
                    kind = (id(group), part.rule, param.device, param.dtype, grad.dtype, grad.layout)
                    if kind not in checked:
                        self._check_gradient(group, param, grad, identity)
                        checked.add(kind)
                    found.append((kind, part, group, place, param, identity, position))
        members: dict[tuple[Any, ...], list[tuple[dict[str, Any], Tensor, dict[str, Any], Part, int]]] = {}
        for kind, part, group, place, param, identity, position in found:
            state = self.state[param] or self._make_state(param, group, place, identity)
            # a loaded checkpoint may have state of another dtype than a new parameter's
            members.setdefault((kind, *_narrow_parts(state)), []).append((group, param, state, part, position))
        buckets, places = [], []
        for each in members.values():
            groups, params, states, parts, where = zip(*each, strict=True)
            buckets.append(Bucket(groups[0], params, states, parts))
            places.append(list(where))
        return buckets, places

    def _check_gradient(self, group: dict[str, Any], param: Tensor, grad: Tensor, identity: str | int) -> None:
        """Raise what an update would raise after others have been made; dtypes may have changed since construction."""
        if grad.layout is not torch.strided:
            raise RuntimeError(f"the gradient of {identity!r} is {grad.layout}; allowed: dense gradients")
        self.check_param(param, group)
        if grad.dtype not in PARAM_DTYPES:
            allowed = ", ".join(map(name_of, PARAM_DTYPES))
            raise TypeError(f"the gradient of {identity!r} is {name_of(grad.dtype)}; allowed: {allowed}")
        choose(group["backend"], (param, grad))

    def _set_transforms(self, buckets: list[Bucket]) -> None:
        """Give every bucket its GradTransform, without waiting for the device."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inv_scale = None if grad_scale is None else grad_scale.float().reciprocal()
        stats = _stats_of_all(buckets)
        if stats is not None and any(bucket.group["skip_nonfinite"] for bucket in buckets):
            self._nonfinite_on(stats.device).add_(stats[1].long())
        for bucket in buckets:
            group, device = bucket.group, bucket.device
            bucket.transform = GradTransform(
                inv_scale=_on(device, inv_scale),
                clip_value=group.get("clip_grad_value"),
                maximize=group["maximize"],
                found_inf=_on(device, found_inf),
                skip_nonfinite=group["skip_nonfinite"] == "tensor",
                skipped=self._nonfinite_on(device),
            )
            if stats is not None:
                bucket.transform = _with_stats(bucket.transform, group, stats.to(device, non_blocking=True))

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

    def _check(self, options: Mapping[str, Any]) -> None:
        self.check_lr(options)
        check_common(options)
        self.check_options(options)

    def init_state(self) -> None:
        """Create the state of every parameter now instead of at its first gradient; on the meta device too."""
        for group, place, param, identity in self._parameters():
            if not self.state[param]:
                self._make_state(param, group, place, identity)

    def _parameters(self) -> Iterator[tuple[dict[str, Any], int, Tensor, str | int]]:
        """(group, place in it, parameter, identity) of all; the identity is the name, or without names the position."""
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                yield group, i, param, names[i] if names else position
                position += 1

    def _make_state(self, param: Tensor, group: dict[str, Any], place: int, identity: str | int) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["uid"] = uid_of(identity)
        state.update(self.state_of(param, group, place))
        return state

    # checkpoints

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_nonfinite", {})
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
                {**own, **self.defaults, **saved} for own, saved in zip(self.param_groups, saved_groups, strict=False)
            ]
            for options in in_force:
                self._check(options)
            saved_params = ((saved_id, options) for options in in_force for saved_id in options["params"])
            for (saved_id, options), (_group, place, param, identity) in zip(
                saved_params, self._parameters(), strict=False
            ):
                if saved_id in incoming["state"]:
                    expected = self.state_of(torch.empty_like(param, device="meta"), options, place)
                    saved = renamed(incoming["state"][saved_id], self.foreign.states, expected)
                    states[param] = converted_state(saved, expected, param, identity)
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


def _same_objects(some: list[object], others: list[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _narrow_parts(state: Mapping[str, Any]) -> list[tuple[str, torch.dtype]]:
    """What of a state is not float32. Other parts may be there or not: a vector goes along with matrices."""
    return [(k, v.dtype) for k, v in state.items() if type(v) is not int and v.dtype is not torch.float32]


def _place_lr(group: dict[str, Any]) -> None:
    """Where capturable, put lr into a tensor beside the parameters, which a captured graph reads at each replay."""
    if group["capturable"] and group["lr"] is not None:
        device = next((param.device for param in group["params"]), None)
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)


def _stats_of_all(buckets: list[Bucket]) -> Tensor | None:
    """`grad_stats` over all buckets on the first one's device, if an option of any of them needs it."""
    if not any(b.group["skip_nonfinite"] == "step" or b.group.get("clip_grad_norm") is not None for b in buckets):
        return None
    stats = [grad_stats(bucket.grads, backend=bucket.group["backend"]) for bucket in buckets]
    return torch.stack([s.to(stats[0].device, non_blocking=True) for s in stats]).sum(0)


def _with_stats(transform: GradTransform, group: Mapping[str, Any], stats: Tensor) -> GradTransform:
    """Add the global clip coefficient, and skip the step where any gradient, and so the norm, is not finite."""
    max_norm = group.get("clip_grad_norm")
    if max_norm is not None:
        norm = stats[0].sqrt() if transform.inv_scale is None else stats[0].sqrt() * transform.inv_scale
        transform = replace(transform, clip_coef=(max_norm / (norm + 1e-6)).clamp(max=1.0))
    if group["skip_nonfinite"] is not False:
        nonfinite = (stats[1] > 0).float()
        found_inf = nonfinite if transform.found_inf is None else torch.maximum(transform.found_inf, nonfinite)
        transform = replace(transform, found_inf=found_inf)
    return transform


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)
