"""AdaLomo in the backward pass with transformers.Trainer: python examples/transformers_trainer.py

It needs pip install '.[hf]'. A small Llama with random weights learns to count; nothing is downloaded. It takes one
device: where there are several, CUDA_VISIBLE_DEVICES=0 before the command.
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowmem_optim import AdaLomo
from lowmem_optim.integrations.transformers import FuseBackwardCallback

VOCABULARY = 32


class Counting(torch.utils.data.Dataset):
    """Sequences that go up by one or two."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(16) * (1 + index % 2)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def main(
    steps: int = 60,
    max_grad_norm: float = 1.0,
    folder: str | None = None,
    save_steps: int = 30,
    resume: str | None = None,
) -> Trainer:
    """Train, from a checkpoint if there is one to resume from, and return the trainer, whose state has the log."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder or tempfile.mkdtemp(),
            max_steps=steps,
            max_grad_norm=max_grad_norm,  # bounds the running norm
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            logging_first_step=True,
            logging_steps=5,
            save_steps=save_steps,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=Counting(1024),
        optimizer_cls_and_kwargs=(AdaLomo, {"lr": 0.02}),
        callbacks=[FuseBackwardCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates (%(default)s)")
    log = [entry for entry in main(parser.parse_args().steps).state.log_history if "loss" in entry]
    print(f"loss {float(log[0]['loss']):.3f} at the start, {float(log[-1]['loss']):.3f} at the end")
