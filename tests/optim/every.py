"""Parametrization over all cases: ``@every_case`` on a test that takes ``case``."""

import pytest
import torch

from optim.cases import discover

CASES = discover()

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
#: those whose lr is a number; the others make their own of the step
cases_with_lr = pytest.mark.parametrize(
    "case", [case for case in CASES if case.options["lr"] is not None], ids=lambda case: case.name
)
stateful_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.state((2, 2), torch.float32)], ids=lambda case: case.name
)
every_peer = pytest.mark.parametrize(
    ("case", "peer"), [pytest.param(case, peer, id=f"{case.name}-{peer.name}") for case in CASES for peer in case.peers]
)

#: float32, and bfloat16 with stochastic rounding, which is its default
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
