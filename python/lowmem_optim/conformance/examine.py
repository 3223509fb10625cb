"""All probes, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..naming import line_of
from . import probes_rule, probes_state, probes_step
from .recognize import Recognition, recognize
from .rules import Rule
from .subject import Subject
from .verdict import Verdict

Probe = Callable[[Subject, Recognition], Verdict]

#: By what is asked, in the order of the report.
PROBES: dict[str, Probe] = {
    "rule": probes_rule.rule,
    "rank of update": probes_rule.rank,
    "weight decay": probes_rule.decay,
    "place of eps": probes_rule.eps,
    "shapes": probes_rule.shapes,
    "grad is None": probes_step.missing_gradient,
    "NaN gradient": probes_step.nan,
    "Inf gradient": probes_step.inf,
    "gradients after step": probes_step.leaves_gradients,
    "lr=0, zero gradients": probes_step.zero_step,
    "bfloat16 updates": probes_step.bfloat16,
    "state of bfloat16": probes_state.state,
    "load_state_dict": probes_state.loading,
    "two runs": probes_state.determinism,
    "resuming": probes_state.resuming,
}


def examine(subject: Subject, against: Rule | None = None) -> Iterator[Verdict]:
    """Yields what each of the `PROBES` says; ``against``: the rule that the subject is said to follow.

    A probe in which the optimizer raises is a verdict, too. Raises ValueError where it cannot be made or run at all.
    The state of torch's random numbers is what it was in the end.
    """
    with torch.random.fork_rng():
        try:
            found = recognize(subject, against)
        except ValueError:
            raise
        except Exception as error:  # anything that somebody else's code raises
            raise ValueError(f"{subject.name} cannot take a step here: {line_of(error)}") from error
        for name, probe in PROBES.items():
            try:
                yield probe(subject, found)
            except Exception as error:  # anything that somebody else's code raises
                yield Verdict(name, f"raises {type(error).__name__}", f"It raises {line_of(error)}.", wrong=True)
