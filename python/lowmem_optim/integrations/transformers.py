"""`fuse_backward` for transformers.Trainer."""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem_optim.fused_backward import FusedBackward, fuse_backward


class FuseBackwardCallback(TrainerCallback):
    """Updates parameters in the backward passes of a Trainer that has an optimizer of this package.

    Give it as one of ``callbacks=[FuseBackwardCallback()]``; the optimizer comes by ``optimizers=`` or
    ``optimizer_cls_and_kwargs=``. Gradient accumulation, resuming and learning rate schedules work as without.

    Args:
        **options: as `fuse_backward` takes them; not loss_scale, since the Trainer calls ``loss.backward()``. Without
            clip_grad_norm and clip_param_norm, ``max_grad_norm`` of the TrainingArguments bounds the running norm.

    The logs' grad_norm is that of all gradients of the last step, before clipping; none where nothing needs it.

    Raises, when training begins:
        TypeError: an optimizer of others, or fp16=True, which comes with a GradScaler.
        RuntimeError: several processes or devices, between which the Trainer would average gradients too late.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._handle: FusedBackward | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Fuse, once state of a checkpoint is loaded."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise RuntimeError(
                f"the Trainer has {args.world_size} processes with {args.n_gpu} devices each; allowed: one of one"
            )
        options = dict(self._options)
        if args.max_grad_norm and "clip_param_norm" not in options:
            options.setdefault("clip_grad_norm", args.max_grad_norm)
        states = GradientState()
        self._handle = fuse_backward(model, optimizer, accumulating=lambda: not states.sync_gradients, **options)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Write the norm in the place of that of no gradients, which is 0."""
        norm = None if self._handle is None else self._handle.grad_norm()
        for entries in (logs, state.log_history[-1]):
            if "grad_norm" in entries:
                entries.pop("grad_norm")
                if norm is not None:
                    entries["grad_norm"] = norm.item()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave an ordinary optimizer behind."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
