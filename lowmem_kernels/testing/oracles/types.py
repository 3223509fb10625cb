"""What oracles take and return; all arrays are float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Options = Mapping[str, Any]
State = dict[str, Array]
#: Gradients of a step; gradients of all steps; options of each parameter at each step.
Grads = Sequence[Array]
AllGrads = Sequence[Grads]
AllOptions = Sequence[Sequence[Options]]
#: Parameters and states at the end.
End = tuple[list[Array], list[State]]
Oracle = Callable[[Sequence[Array], AllGrads, AllOptions], End]
