"""`lowmem doctor`: whether the kernels are right on this machine, and what any optimizer does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from lowmem_optim.cli.arguments import blaming, option, progress_bar
from lowmem_optim.cli.files import json_of, make_place

if TYPE_CHECKING:
    from lowmem_optim.conformance import Check, Rule, Subject, Verdict

T = TypeVar("T")
EXAMINED, PLACE, FILES = "Examine an optimizer", "Where", "Output"
#: Arguments of optimizers that the probes set themselves.
SET_BY_PROBES = ("lr", "weight_decay")


def doctor_command(
    optimizer: Annotated[
        str | None,
        option(
            EXAMINED,
            "A class instead of this package's on this machine: torch.optim:AdamW, transformers:Adafactor, "
            "lowmem_optim:CAME or your own.",
            *("-o", "--optimizer"),
            metavar="MODULE:CLASS",
            default=False,
        ),
    ] = None,
    opt: Annotated[
        list[str] | None,
        option(EXAMINED, "Argument of its constructor, as in betas=(0.9, 0.95). Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    group: Annotated[
        list[str] | None,
        option(
            EXAMINED,
            "Option of its parameter group, for classes that have some there only, as rank=4 of galore_torch. "
            "Repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    against: Annotated[
        str | None,
        option(
            EXAMINED,
            "The rule that it is said to follow: AdamW, Adam, Lomo, Adafactor (transformers), TorchAdafactor, AdaLomo, "
            "CAME, SinkGD, MNGD, SWAN, APOLLO, APOLLOMini, AdaPM, AdamMini.",
            metavar="RULE",
            default="found by itself",
        ),
    ] = None,
    device: Annotated[str, option(PLACE, "Where to run.", metavar="auto|cpu|cuda|cuda:N")] = "auto",
    json: Annotated[
        Path | None, option(FILES, "File for all that was found; - prints it and nothing else.", default=False)
    ] = None,
) -> None:
    """Check this machine: versions, devices, the backend, and every optimizer's kernels against the reference.

    With --optimizer, say what any class of optimizers does, against rules in float64. Exits with 1 if something is
    wrong.
    """
    # here rather than above, so that `lowmem --help` need not wait for torch
    from lowmem_optim.cli import doctor_report, registry
    from lowmem_optim.cli.doctor_facts import facts
    from lowmem_optim.cli.loop import find_device
    from lowmem_optim.conformance import find_rule, load_subject

    if optimizer is None:
        for flag, given in (("--opt", opt), ("--group", group), ("--against", against)):
            if given:
                raise typer.BadParameter("it says something of --optimizer, which is missing", param_hint=f"'{flag}'")
    with blaming("--device"):
        device = find_device(device)
    with blaming("--against"):
        rule = against and find_rule(against)
    subject = None
    if optimizer is not None:
        with blaming("--optimizer"):
            subject = load_subject(optimizer, device)
        with blaming("--opt"):
            choice = registry.Choice(subject.name, subject.cls)
            options = registry.parse_options(opt or [], [choice], elsewhere={})
            for key in SET_BY_PROBES:
                if key in options:
                    raise ValueError(f"{key} is {options[key]!r}, and the probes choose it; allowed: other arguments")
        with blaming("--group"):
            subject = replace(subject, options=options, group=registry.parse_pairs(group or []))
    to_stdout = str(json) == "-"
    with blaming("--json"):
        if json is not None and not to_stdout:
            make_place(json)

    console = Console(quiet=to_stdout)
    found = facts(device)
    shown = doctor_report.wide(console) if not to_stdout else console
    doctor_report.show_facts(shown, found)
    if subject is None:
        wrong, parts = _check_all(shown, device)
        wrong |= found["backend"]["name"] == "none"
    else:
        with blaming("--opt" if opt else "--optimizer"):
            wrong, parts = _examine(shown, subject, rule or None)
    text = json_of({"environment": found, **parts})
    if to_stdout:
        typer.echo(text, nl=False)
    elif json is not None:
        json.write_text(text, encoding="utf-8")
        console.print(json, soft_wrap=True, highlight=False)
    if wrong:
        raise typer.Exit(1)


def _check_all(console: Console, device: str) -> tuple[bool, dict[str, object]]:
    """The self-check: whether something failed, and what JSON says of it."""
    from lowmem_kernels.dispatch import interpreting
    from lowmem_optim.cli import doctor_report, registry
    from lowmem_optim.conformance import Subject, self_check
    from lowmem_optim.conformance.selfcheck import how

    backend, said = how(device)
    if backend == "triton" and interpreting():
        from lowmem_kernels.testing.prepare import prepare_interpreter

        prepare_interpreter()
    subjects = [Subject(each.name, each.cls, device=device) for each in registry.choices().values() if each.can_fuse]
    total = len(subjects) * (2 if backend == "triton" else 1)
    checks: list[Check] = list(_with_bar(console, self_check(subjects), total, "checking"))
    doctor_report.show_checks(console, said, checks)
    failed = [check.optimizer for check in checks if not check.ok]
    verdict = f"Failed: {', '.join(dict.fromkeys(failed))}." if failed else "All optimizers are right here."
    console.print(verdict, style="bold", highlight=False)
    return bool(failed), {"self_check": doctor_report.checks_for_json(said, checks)}


def _examine(console: Console, subject: "Subject", rule: "Rule | None") -> tuple[bool, dict[str, object]]:
    """The probes of one optimizer: whether something is wrong, and what JSON says of it."""
    from lowmem_optim.cli import doctor_report
    from lowmem_optim.conformance import PROBES, examine

    verdicts: list[Verdict] = list(_with_bar(console, examine(subject, rule), len(PROBES), subject.name))
    arguments = ", ".join(f"{key}={value!r}" for key, value in subject.arguments.items())
    of_group = f" with {dict(subject.group)} in its group" if subject.group else ""
    doctor_report.show_verdicts(console, f"{subject.name}({arguments}){of_group} on {subject.device}", verdicts)
    wrong = [verdict.probe for verdict in verdicts if verdict.wrong]
    told = f"Wrong: {', '.join(wrong)}." if wrong else "Nothing is wrong; the rest is what it chose to do."
    console.print(told, style="bold", highlight=False)
    options = {
        "name": subject.name,
        "version": subject.version,
        "arguments": subject.arguments,
        "group": subject.group,
        "device": subject.device,
    }
    return bool(wrong), {"optimizer": options, "verdicts": [vars(verdict) for verdict in verdicts]}


def _with_bar(console: Console, work: Iterator[T], total: int, doing: str) -> Iterator[T]:
    """What the iterator yields, with a progress bar where there is a terminal."""
    with progress_bar(console) as progress:
        yield from progress.track(work, total, description=doing)
