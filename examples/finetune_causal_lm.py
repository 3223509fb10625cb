"""Fine-tune a causal language model in bfloat16, in a loop of one's own: python examples/finetune_causal_lm.py

It needs pip install '.[hf]'. As it stands, a tiny Llama with random weights learns this file byte by byte; nothing is
downloaded. For real use, from a folder or a name on the Hugging Face hub, with gradients freed as they arrive:

    python examples/finetune_causal_lm.py --model FOLDER --text FILE --output runs/tuned --context 1024 --steps 1000 \\
        --optimizer AdaLomo --lr 5e-4 --fuse --micro-batches 1 --gradient-checkpointing

With --output it leaves the model there, as transformers keeps it, and before that a checkpoint every --save-every
steps, from which the same command carries on with the same bits.
"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_scheduler

import lowmem_optim
from lowmem_optim import fuse_backward, split_params

NAMES = [name for name in lowmem_optim.__all__ if isinstance(getattr(lowmem_optim, name), type)]
#: without which it takes no lr, or one in units of the parameter's size
OPTIONS: dict[str, dict[str, Any]] = {"Adafactor": {"relative_step": False, "scale_parameter": False}}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model (a tiny Llama)")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text file to learn (this one)")
    parser.add_argument("--output", type=Path, help="folder for the checkpoint and the model (none is kept)")
    parser.add_argument("--optimizer", choices=NAMES, default="SinkGD", help="by name (%(default)s)")
    parser.add_argument("--lr", type=float, help="its learning rate (the optimizer's default; Adafactor has none)")
    parser.add_argument("--steps", type=int, default=60, help="updates (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a micro-batch (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=2, help="that make an update (%(default)s)")
    parser.add_argument("--context", type=int, default=64, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="bound on the norm of the gradient (%(default)s)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--fuse", action="store_true", help="update in the backward pass; clips by a running norm")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="keep fewer activations")
    return parser.parse_args(arguments)


def load(args: argparse.Namespace) -> tuple[Any, Any, torch.Tensor]:
    """Return a model, its tokenizer, and the text as tokens; without --model a random one, and the text as bytes."""
    text = args.text.read_text(encoding="utf-8")
    if args.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        return model, tokenizer, tokenizer(text, return_tensors="pt").input_ids[0]
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    # not .to(bfloat16), which would round the frequencies of positions as well
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **shape), dtype=torch.bfloat16)
    return model, None, torch.tensor(list(text.encode()))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash at any time leaves the last one or this one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    args = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, tokens = load(args)
    if len(tokens) < args.context:
        raise SystemExit(f"{args.text} has {len(tokens)} tokens; allowed: at least --context, {args.context}")
    model.to(device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    options = {**OPTIONS.get(args.optimizer, {}), **({} if args.lr is None else {"lr": args.lr})}
    optimizer = getattr(lowmem_optim, args.optimizer)(split_params(model), **options)
    scheduler = get_scheduler("cosine", optimizer, args.steps // 10, args.steps)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    start, path = 0, None if args.output is None else args.output / "checkpoint.pt"
    if path is not None and path.exists():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        start = checkpoint.pop("step")
        for name, part in parts.items():
            # popped: a copy of all would stay in memory
            part.load_state_dict(checkpoint.pop(name))
        print(f"carries on from step {start} of {path}")
    handle = fuse_backward(model, optimizer, clip_grad_norm=args.clip) if args.fuse else None

    losses = []
    for step in range(start, args.steps):
        # of batches and dropout: whoever carries on draws what would have been drawn
        torch.manual_seed(step)
        total = torch.zeros((), device=device)
        for i in range(args.micro_batches):
            first = torch.randint(len(tokens) - args.context + 1, (args.batch_size,))
            sequences = tokens.unfold(0, args.context, 1)[first].to(device)
            loss = model(input_ids=sequences, labels=sequences, use_cache=False).loss / args.micro_batches
            total += loss.detach()
            # fused, the last one updates
            with handle.accumulate() if handle and i < args.micro_batches - 1 else nullcontext():
                loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip) if handle is None else handle.grad_norm()
        # nothing is left for it to change if it is fused
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {total:.3f}, norm of the gradient {norm:.2f}", flush=True)
        if path is not None and ((step + 1) % args.save_every == 0 or step == args.steps - 1):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}})

    state = [t for kept in optimizer.state.values() for t in kept.values() if isinstance(t, torch.Tensor)]
    size = sum(t.nbytes for t in state) / model.num_parameters()
    print(f"{args.optimizer}: {size:.3f} bytes of state for each of {model.num_parameters():,} parameters")
    if args.output is not None:
        for part in (model, *([] if tokenizer is None else [tokenizer])):
            part.save_pretrained(args.output)
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    main()
