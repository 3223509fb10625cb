"""What `lowmem train` is to do, from the command's arguments or from a folder where they were kept."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from lowmem_optim.cli import registry
from lowmem_optim.cli.arguments import blaming
from lowmem_optim.cli.data import Text, load_text
from lowmem_optim.cli.files import make_folder, write_whole
from lowmem_optim.cli.loop import TrainConfig, find_device
from lowmem_optim.cli.model import ModelConfig
from lowmem_optim.cli.processes import Processes, check_processes
from lowmem_optim.cli.registry import Choice

DEFAULT_OPTIMIZER = "adamw"
DEFAULT_COMPARISON = ("adalomo", "adafactor", "sinkgd")
FILE = "settings.json"


@dataclass(frozen=True)
class Training:
    """The optimizers to compare, what they have in common, and the text."""

    choices: list[Choice]
    config: TrainConfig
    text: Text


def training_of(arguments: dict[str, Any]) -> Training:
    """What the command's arguments, by name, ask for. Raises a usage error that names an option."""
    name, compare = arguments["optimizer"], arguments["compare"]
    # typer's context has an empty list where the command's own parameter would be None
    if name is None and not compare:
        compare = [*DEFAULT_COMPARISON]
    with blaming("--optimizer"):
        choices = [registry.find(name or DEFAULT_OPTIMIZER)]
    with blaming("--compare"):
        choices += [registry.find(name) for name in compare or []]
        twice = next((choice.name for i, choice in enumerate(choices) if choice in choices[:i]), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice; allowed: each optimizer once, with --sweep in several ways")
    options = _options(arguments, choices)
    with blaming("--sweep"):
        given = [key for key in ("lr", *options) if options.get(key, arguments.get(key)) is not None]
        choices = _swept(arguments["sweep"] or [], choices, given)
    config = _config(arguments, choices, options)
    with blaming("--data"):
        path = arguments["data"]
        text = load_text(None if path is None else Path(path), config.model.context)
    return Training(choices, config, text)


def new_folder(path: Path | None, arguments: dict[str, Any], choices: list[Choice]) -> Path:
    """Makes the folder, or one with the time and the optimizers in its name.

    Raises ValueError for one that has a training, and for one in the text's folder, whose files would become text.
    """
    names = dict.fromkeys(choice.name.lower() for choice in choices)
    path = path or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{'-'.join(names)}"
    data = arguments["data"]
    if data is not None and path.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"{path} is in {data}, all of whose files are the text; allowed: a folder elsewhere")
    folder = make_folder(path)
    if (folder / FILE).exists():
        raise ValueError(f"there is a training in {folder}; allowed: a new folder, or --resume {folder}")
    return folder


def write_settings(folder: Path, arguments: dict[str, Any], training: Training) -> None:
    """Keeps the arguments in a folder, for `read_settings`."""
    path = arguments["data"]
    # a resumed training may start elsewhere
    arguments = arguments | {"data": None if path is None else str(Path(path).resolve())}
    write_whole(folder / FILE, json.dumps({"arguments": arguments, "text": _fingerprint(training.text)}, indent=1))


def read_settings(folder: Path, instead: Mapping[str, Any]) -> Training:
    """What the arguments that a folder keeps ask for, with others instead of some.

    Raises ValueError where there are none, or where the text has changed.
    """
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} has no {FILE}; allowed: a folder that lowmem train has written into") from error
    except ValueError as error:
        raise ValueError(f"{folder / FILE} is not JSON: {error}") from error
    try:
        arguments, fingerprint = {**kept["arguments"], **instead}, kept["text"]
        if instead.get("nproc") == 1 and "sharding" not in instead:  # that of several processes
            arguments["sharding"] = None
        training = training_of(arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is not that of this version of lowmem train: {error!r}") from error
    if fingerprint != _fingerprint(training.text):
        raise ValueError(f"{training.text.source} is not the text that the training in {folder} began with")
    return training


def _fingerprint(text: Text) -> str:
    digest = hashlib.sha256()
    for split in (text.training, text.validation):
        digest.update(split.numpy().tobytes())
    return digest.hexdigest()


def _options(arguments: dict[str, Any], choices: list[Choice]) -> dict[str, Any]:
    with blaming("--opt"):
        options = registry.parse_options(arguments["opt"] or [], choices)
    backend = arguments["backend"]
    for flag, key, value in (
        ("--weight-decay", "weight_decay", arguments["weight_decay"]),
        ("--backend", "backend", None if backend == "auto" else backend),
    ):
        if value is not None:
            with blaming(flag):
                registry.require_taker(key, choices)
            options[key] = value
    return options


def _swept(pairs: list[str], choices: list[Choice], given: list[str]) -> list[Choice]:
    """Each optimizer once for each combination of the sweeps' values."""
    sweeps = registry.parse_sweeps(pairs, choices)
    for key in sweeps:
        if key in given:
            raise ValueError(f"{key!r} has one value already, by {registry.NAMED_OPTIONS.get(key, '--opt')}")
    values = [[(key, value) for value in values] for key, values in sweeps.items()]
    return [Choice(choice.name, choice.cls, combination) for choice in choices for combination in product(*values)]


def _config(arguments: dict[str, Any], choices: list[Choice], options: dict[str, Any]) -> TrainConfig:
    steps, warmup, nproc, sharding = (arguments[key] for key in ("steps", "warmup", "nproc", "sharding"))
    fused, clip = arguments["fused_backward"], arguments["clip_grad_norm"]
    if fused and not any(choice.can_fuse for choice in choices):
        names = " and ".join(choice.name for choice in choices)
        with blaming("--fused-backward"):
            raise ValueError(f"{names} cannot; name one of this package")
    with blaming("--dim"):
        model = ModelConfig.from_width(arguments["layers"], arguments["dim"], arguments["context"])
    with blaming("--warmup"):
        if warmup is not None and warmup > steps:
            raise ValueError(f"{warmup} is more than --steps {steps}")
    with blaming("--device"):
        device = find_device(arguments["device"])
    with blaming("--nproc"):
        check_processes(nproc, arguments["batch_size"], device)
    with blaming("--sharding"):
        if sharding is not None and nproc == 1:
            raise ValueError(f"{sharding} with --nproc 1; allowed: several processes")
    with blaming("--clip-grad-norm"):
        if nproc > 1 and sharding != "ddp" and fused and clip:
            raise ValueError(f"{clip:g} with --fused-backward and fsdp2; allowed: 0")
    same = ("batch_size", "lr", "clip_grad_norm", "seed", "dtype", "eval_every", "eval_batches", "fused_backward")
    return TrainConfig(
        model=model,
        steps=steps,
        warmup=steps // 20 if warmup is None else warmup,
        device=device,
        options=options,
        processes=Processes(nproc, (sharding or "fsdp2") if nproc > 1 else "none"),
        **{key: arguments[key] for key in (*same, "schedule", "final_lr", "log_every", "checkpoint_every")},
    )
