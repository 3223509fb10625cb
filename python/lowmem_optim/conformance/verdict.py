"""What a probe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """One line of a report.

    probe: what was asked.
    finding: the answer in a few words, for tables.
    sentence: the same as a sentence, with what it means.
    wrong: whether it is a defect, and no choice that somebody may have made on purpose.
    figures: the numbers behind it, by name.
    """

    probe: str
    finding: str
    sentence: str
    wrong: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
