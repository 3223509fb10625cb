"""AdaLomo in the backward pass with Lightning: python examples/lightning_module.py

It needs pip install '.[lightning]'.
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowmem_optim import AdaLomo
from lowmem_optim.integrations.lightning import FuseBackwardCallback


class Regression(pl.LightningModule):
    """Learns the sine of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.layers(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        """Return AdaLomo, as always: the callback does the rest."""
        optimizer = AdaLomo(self.named_parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(steps: int = 200, gradient_clip_val: float | None = 1.0) -> Regression:
    """Train, and return the module."""
    torch.manual_seed(0)
    module = Regression()
    x = torch.randn(32 * 2 * steps, 2)
    data = DataLoader(TensorDataset(x, (x[:, :1] * x[:, 1:]).sin()), batch_size=32)
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=gradient_clip_val,  # bounds the running norm
        callbacks=[FuseBackwardCallback()],
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (%(default)s)")
    losses = main(parser.parse_args().steps).losses
    print(f"loss {sum(losses[:20]) / 20:.4f} at the start, {sum(losses[-20:]) / 20:.4f} at the end")
