"""`fuse_backward` for Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lowmem_optim.fused_backward import FusedBackward, fuse_backward
from lowmem_optim.fused_checks import SCALER


class FuseBackwardCallback(pl.Callback):
    """Updates parameters in the backward passes of a Trainer whose module has one optimizer, of this package.

    ``gradient_clip_val`` and ``accumulate_grad_batches`` of the Trainer hold, a bound on the norm by the running norm;
    so do checkpoints and learning rate schedules. ``grad_norm``, before clipping, is logged where something needs it.

    Args:
        **options: as `fuse_backward` takes them; not loss_scale, since Lightning calls ``loss.backward()``.

    Raises, when training begins:
        TypeError: an optimizer of others, or precision="16-mixed", which comes with a GradScaler.
        RuntimeError: several optimizers.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._handle: FusedBackward | None = None
        self._accumulates = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuse, once state of a checkpoint is loaded."""
        if len(trainer.optimizers) != 1:
            raise RuntimeError(f"the module has {len(trainer.optimizers)} optimizers; allowed: one")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise TypeError(f"precision is {trainer.precision!r}; {SCALER}")
        options = dict(self._options)
        if trainer.gradient_clip_val and "clip_param_norm" not in options:
            by_value = trainer.gradient_clip_algorithm == "value"
            options.setdefault("clip_grad_value" if by_value else "clip_grad_norm", trainer.gradient_clip_val)
        # with several processes, the module in its DistributedDataParallel
        model = trainer.strategy.model
        self._handle = fuse_backward(
            model if isinstance(model, nn.Module) else pl_module,
            trainer.optimizers[0],
            accumulating=lambda: self._accumulates,
            **options,
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See whether the batch's gradients are only to be accumulated."""
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._accumulates = not (last or trainer.is_last_batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norm."""
        norm = None if self._handle is None else self._handle.grad_norm()
        if norm is not None:
            self.log("grad_norm", norm)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary optimizer behind."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
