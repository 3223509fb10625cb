"""What an optimizer does: any torch.optim class against the rules in float64, and this package's on this machine.

`lowmem doctor` prints it. `examine` runs the probes on a `Subject`; `self_check` compares this package's optimizers on
the backend of a device with the torch reference or with the oracles.
"""

from .examine import PROBES, examine
from .rules import RULES, Rule, find_rule
from .selfcheck import Check, self_check
from .subject import Subject, load_subject
from .verdict import Verdict

__all__ = [
    "PROBES",
    "RULES",
    "Check",
    "Rule",
    "Subject",
    "Verdict",
    "examine",
    "find_rule",
    "load_subject",
    "self_check",
]
