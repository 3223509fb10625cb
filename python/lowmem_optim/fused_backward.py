"""The update inside the backward pass: a gradient is used and freed as it arrives, for every optimizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import LowMemOptimizer
from .fused_checks import (
    SCALER,
    check_alone,
    check_clip,
    check_loss_scale,
    check_model,
    check_pieces,
    names_of,
    unwrapped,
)
from .fused_clipping import Clipping
from .fused_groups import GradientGroups, free_gradients
from .fused_replicas import Replicas, Unsynchronized, find_wrapper
from .sharding import any_sharded, is_sharded


def fuse_backward(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    clip_param_norm: float | None = None,
    loss_scale: float | str | None = None,
    accumulating: Callable[[], bool] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> FusedBackward:
    """Let backward passes through a model update its parameters, each as soon as its gradient has arrived.

    From then on every ``loss.backward()`` is a step of the optimizer, with the bits that `step` would give, and no more
    gradients exist at a time than those of the two largest parameters. ``optimizer.step()`` changes no parameter and
    ``zero_grad()`` has nothing to do; schedulers may be stepped as before. `FusedBackward.remove` ends it.

    Args:
        model: whose backward passes these are; a DistributedDataParallel for one that has been wrapped, or one that
            ``fully_shard`` has sharded, whose gradients are used as shards, when they have been averaged.
        optimizer: of this package, or as a trainer has wrapped it; all its parameters are the model's.
        clip_grad_norm: bound on the norm of all gradients together, > 0; None: that of each group, if it has one.
            ``handle.backward(loss, exact=True)`` knows the norm. Otherwise the larger of its running mean over earlier
            passes and the norm of the gradients so far stands for it. math.inf only measures.
        clip_grad_value: bound on each element of the unscaled gradient, > 0; None: that of each group, if it has one.
        clip_param_norm: bound on the norm of each parameter's own gradient, > 0; not together with clip_grad_norm.
        loss_scale: what `FusedBackward.backward` multiplies the loss by, for float16: a number > 0, or "dynamic", which
            starts at 65536, halves when a gradient overflows, and doubles after 2000 passes without.
        accumulating: asked in every backward pass whether it is a micro-batch that only accumulates gradients, as
            ``lambda: not accelerator.sync_gradients``; None: `FusedBackward.accumulate` says so.
        process_group: of processes that train the same model, over which gradients are averaged before they are used;
            None: that of a DistributedDataParallel.

    Raises:
        TypeError: an optimizer of others, one with a GradScaler, a FullyShardedDataParallel.
        ValueError: an optimizer that is fused already or has parameters of another model; bounds that are not allowed,
            of which DTensors have none but clip_grad_value.

    Source: Lv et al., arXiv 2306.09782, which does this for gradient descent; with `AdaLomo`, arXiv 2310.10195.
    """
    own = unwrapped(optimizer)
    check_model(model, own)
    check_clip(clip_grad_norm, clip_grad_value, clip_param_norm, own.param_groups)
    check_loss_scale(loss_scale)
    bounds = {"clip_grad_norm": clip_grad_norm, "clip_param_norm": clip_param_norm, "loss_scale": loss_scale}
    check_pieces(own, bounds)
    clipping = Clipping(own, clip_grad_norm, clip_grad_value, clip_param_norm, loss_scale)
    groups = GradientGroups(own, alone=clip_param_norm is not None)
    return FusedBackward(model, own, groups, clipping, accumulating, process_group)


class FusedBackward:
    """What `fuse_backward` returns; as a context manager, it ends with the context."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: LowMemOptimizer,
        groups: GradientGroups,
        clipping: Clipping,
        accumulating: Callable[[], bool] | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self._clipping = clipping
        self._asks = accumulating
        self._names = names_of(model)
        self._lock = threading.RLock()
        self._depth = 0
        # of the pass under way: came by `backward`; only measures; leaves gradients; has gradients that are averages
        self._called, self._measuring, self._keeps, self._averaged = False, False, False, False
        self._hooks: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        wrapper = find_wrapper(model)
        if wrapper is not None and process_group is None:
            process_group = wrapper.process_group
        self._unsynchronized = None if wrapper is None else Unsynchronized(wrapper)
        params = [member.param for member in optimizer.members()]
        # FSDP2 has averaged the gradients of DTensors before they arrive
        self._in_pieces = any_sharded(params)
        self._averages = all(map(is_sharded, params))
        device = params[0].device
        self._replicas = None if process_group is None else Replicas(process_group, device)
        self._micro_batches: dict[Tensor, None] = {}
        self._end_pass()
        optimizer.fused = self
        self.watch()

    def __enter__(self) -> FusedBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Make backward passes leave gradients again, for `step` to use; those of micro-batches stay."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if self._unsynchronized is not None:
            self._unsynchronized.undo()
            self._unsynchronized = None
        if self._optimizer.fused is self:
            self._optimizer.fused = None

    # what a training loop calls

    def backward(self, loss: Tensor, *, exact: bool = False, retain_graph: bool = False) -> None:
        """Do a backward pass from ``loss``, times the loss scale, and update parameters in it.

        With ``exact`` there are two: the first takes the norm of all gradients and looks for NaN and Inf, and the
        second updates with that, or nothing at all. Activations are kept for it. Where micro-batches have left
        gradients, all gradients exist anyway, and one pass is enough.

        Args:
            loss: a scalar.
            exact: clip by the norm itself, and skip the whole step where a gradient is not finite.
            retain_graph: as in torch.Tensor.backward.
        """
        if exact and self._in_pieces:
            raise ValueError("exact is True and parameters are DTensors; allowed: False, or optimizer.step()")
        scale = self._clipping.scale()
        scaled = loss if scale is None else loss * scale.to(loss.device, non_blocking=True)
        self._called = True
        try:
            if not exact or self._accumulates():
                self._run(scaled, retain_graph)
            elif self._left_by_micro_batches():
                with self.accumulate():
                    self._run(scaled, retain_graph)
                self._update_all()
            else:
                with self._measured():
                    self._run(scaled, retain_graph=True)
                self._run(scaled, retain_graph)
        except BaseException:
            self.forget()
            raise
        finally:
            self._called, self._clipping.exact = False, None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes in this context only add to gradients; the next one outside uses the sum.

        Gradients of all parameters then exist, as without `fuse_backward`.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def grad_norm(self) -> Tensor | None:
        """Return the norm of all gradients of the last step, before clipping, or None if nothing needed it.

        A 0-d float32 tensor on the first parameter's device. What is not finite does not count.
        """
        return self._clipping.norm

    def loss_scale(self) -> Tensor | None:
        """Return what the next loss is multiplied by, or None: a 0-d float32 tensor on the first parameter's device."""
        scale = self._clipping.scale()
        return None if scale is None else scale.clone()

    # what the optimizer calls

    def discard_gradients(self) -> None:
        """Make the state of parameters that have a gradient, and drop the gradient: what `step` does meanwhile."""
        if any(getattr(self._optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            self._optimizer.grad_scale = self._optimizer.found_inf = None
            raise RuntimeError(f"optimizer is fused with the backward pass and was stepped by a GradScaler; {SCALER}")
        if self._left_by_micro_batches():
            raise RuntimeError(
                "optimizer.step() was called with gradients of micro-batches that nothing has used; allowed: the last "
                "micro-batch's backward pass outside of handle.accumulate(), or optimizer.zero_grad() to drop them"
            )
        if self._underway and not self._groups.waits():
            self._finish_pass()
        self.forget()
        for member in self._optimizer.members():
            if member.param.grad is not None:
                if not self._optimizer.state[member.param]:
                    self._optimizer.make_state(member)
                member.param.grad = None

    def forget(self) -> None:
        """Forget the gradients of micro-batches and of a backward pass that has failed."""
        self._micro_batches.clear()
        self._groups.forget()
        self._end_pass()

    def watch(self) -> None:
        """Put hooks on parameters that have none yet, also on those that do not require a gradient now."""
        for _, _, param, _ in self._optimizer.members():
            if param not in self._hooks:
                requires_grad = param.requires_grad
                self._hooks[param] = param.requires_grad_().register_post_accumulate_grad_hook(self._arrived)
                param.requires_grad_(requires_grad)

    # a backward pass

    def _run(self, loss: Tensor, retain_graph: bool) -> None:
        loss.backward(retain_graph=retain_graph)
        # of a pass in which all was inside segments of reentrant checkpointing, nobody has seen the end
        self._finish_pass()

    def _arrived(self, param: Tensor) -> None:
        """Called by autograd when the gradient of a parameter is complete."""
        with self._guarded():
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "backward(create_graph=True) on a fused model: gradients are used and freed, and have no graph; "
                    "allowed: torch.autograd.grad(..., create_graph=True), and a backward pass of what is made of it"
                )
            self._enter_task()
            if self._accumulates():
                self._micro_batches[param] = None
                return
            if not self._underway:
                self._begin_pass()
            if param in self._seen:
                raise RuntimeError(self._seen_twice(param))
            self._seen.add(param)
            self._process(self._groups.arrived(param))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; autograd has one for each device. After an error nothing of the pass is left."""
        with self._lock:
            try:
                yield
            except BaseException:
                self.forget()
                raise

    def _enter_task(self) -> None:
        """Be called back at the end of a pass. Each segment of reentrant checkpointing is one inside another."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._task_ended)

    def _task_ended(self) -> None:
        with self._guarded():
            if torch._C._current_autograd_node() is None:
                self._finish_pass()
            elif self._underway:
                self._process_waiting()

    def _begin_pass(self) -> None:
        """Refuse what cannot be, before any parameter changes."""
        self._groups.refresh()
        exact = self._measuring or self._clipping.exact is not None
        if self._clipping.scales and not self._called:
            raise RuntimeError("there is a loss_scale; allowed: handle.backward(loss), which multiplies by it")
        if not exact and any(group["skip_nonfinite"] == "step" for group in self._optimizer.param_groups):
            raise RuntimeError(
                "skip_nonfinite is 'step', but parameters are updated before later gradients are known; allowed: "
                "handle.backward(loss, exact=True), or skip_nonfinite='tensor'"
            )
        if self._replicas is not None:
            self._replicas.check()
        elif not self._averages:
            check_alone()
        self._clipping.begin(self._measuring)
        self._underway = True

    def _finish_pass(self) -> None:
        if self._underway:
            # what the last micro-batch has not used, but others have
            for param in self._left_by_micro_batches():
                self._process(self._groups.arrived(param))
            self._process_waiting()
            if self._replicas is not None and not self._averaged:
                self._replicas.end()
            self._clipping.end()
            if not self._measuring:
                self._micro_batches.clear()
                # what schedulers look at before they warn that no step has been taken
                self._optimizer._opt_called = True  # type: ignore[attr-defined]
        self._end_pass()

    def _end_pass(self) -> None:
        self._underway = False
        self._tasks: set[int] = set()
        self._seen: set[Tensor] = set()
        self._begun: set[int] = set()
        self._in_flight: list[tuple[list[Tensor], Callable[[], object]]] = []

    def _process(self, params: list[Tensor]) -> None:
        """Use and free gradients, or first send them off and use those that were sent before."""
        if not params:
            return
        if self._replicas is None or self._averaged:
            self._use(params)
            return
        self._in_flight.append((params, self._replicas.average(params, self._groups.identities(params))))
        if len(self._in_flight) > 1:
            self._use_sent()

    def _process_waiting(self) -> None:
        for params in self._groups.all_waiting():
            self._process(params)
        while self._in_flight:
            self._use_sent()

    def _use_sent(self) -> None:
        params, wait = self._in_flight.pop(0)
        wait()
        self._use(params)

    @torch.no_grad()
    def _use(self, params: list[Tensor]) -> None:
        buckets = self._groups.buckets(params)
        self._clipping.measure(buckets)
        if not self._measuring:
            for bucket in buckets:
                bucket.transform = self._clipping.transform(bucket)
            self._optimizer.begin_step([bucket for bucket in buckets if id(bucket.group) not in self._begun])
            self._begun.update([id(bucket.group) for bucket in buckets])
            for bucket in buckets:
                self._optimizer.update_everywhere(bucket)
        free_gradients([] if self._keeps else params, buckets)

    @contextmanager
    def _measured(self, keep: bool = False) -> Iterator[None]:
        """Gradients that arrive in this context are measured, and freed unless they are to be kept."""
        self._measuring, self._keeps = True, keep
        try:
            yield
        finally:
            self._measuring, self._keeps = False, False

    def _update_all(self) -> None:
        """Update by gradients that all exist: measure, then use, group by group."""
        params = [member.param for member in self._optimizer.members() if member.param.grad is not None]
        with torch.no_grad(), self._measured(keep=True):
            self._pass_over(params)
        self._averaged = True
        try:
            with torch.no_grad():
                self._pass_over(params)
        finally:
            self._averaged = False

    def _pass_over(self, params: list[Tensor]) -> None:
        self._begin_pass()
        for param in params:
            self._seen.add(param)
            self._process(self._groups.arrived(param))
        self._finish_pass()

    # micro-batches

    def _accumulates(self) -> bool:
        return self._depth > 0 or (self._asks is not None and self._asks())

    def _left_by_micro_batches(self) -> list[Tensor]:
        return [param for param in self._micro_batches if param.grad is not None and param not in self._seen]

    def _seen_twice(self, param: Tensor) -> str:
        return (
            f"parameter {self._names.get(param)!r} got a second gradient in one backward pass, when the first was "
            "used. Reentrant activation checkpointing does that to a parameter that several of its segments share: "
            "allowed there: use_reentrant=False. After a backward pass that has failed: optimizer.zero_grad() first"
        )
