"""What every tier shares: its mark and its process, fixed seeds, poisoned memory."""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
PACKAGES = ("lowmem_kernels", "lowmem_optim")
BUDGET_SECONDS = {"spec": 120, "interp": 240, "compile": 240, "optim": 330, "docs": 60}
GARBAGE = 0x5A


def pytest_configure(config):
    # two workers share the processors, and sums do not depend on how many there are
    torch.set_num_threads(1)
    if INTERPRETING:
        from lowmem_kernels.testing.prepare import prepare_interpreter

        prepare_interpreter()


def pytest_collect_file(file_path, parent):
    """Stop before a test module is imported: Triton decides at import whether kernels are compiled or interpreted."""
    tier = _tier(file_path)
    if file_path.suffix == ".py" and tier and (tier == "interp") is not INTERPRETING:
        wanted = "needs TRITON_INTERPRET=1" if tier == "interp" else "runs without TRITON_INTERPRET"
        pytest.exit(f"tests/{tier} {wanted}: each tier is a process of its own, see `make test-{tier}`", returncode=4)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(_tier(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadgroup, one worker runs all tests with the same parameters: what is compiled for one serves all.

    xdist has a mark for that, which pytest 9.2 and xdist 3.8.0 together ignore without a word.
    """
    if config.getvalue("dist") == "loadgroup":
        from xdist.scheduler import LoadScopeScheduling

        scheduler = LoadScopeScheduling(config, log)
        scheduler._split_scope = lambda nodeid: nodeid.partition("[")[2] or nodeid
        return scheduler
    return None


def pytest_sessionstart(session):
    session.config.started = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    """Print what a tier took of its budget, which is for two cores; a test does not fail for being slow."""
    seconds = time.monotonic() - config.started
    for tier, budget in BUDGET_SECONDS.items():
        if any(Path(argument).parts[-1:] == (tier,) for argument in config.args):
            terminalreporter.write_line(f"tier {tier}: {seconds:.0f} s of a budget of {budget} s")


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what a library under test may draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill what the packages get from torch.empty with NaN or garbage, so that a forgotten write is visible."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        module = sys._getframe(1).f_globals.get("__name__", "")
        if module.split(".")[0] in PACKAGES and tensor.device.type != "meta":
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype is not torch.bool:
                tensor.fill_(int.from_bytes(bytes([GARBAGE]) * tensor.element_size(), "little"))
        return tensor

    return wrapper


def _tier(path):
    parts = path.relative_to(TESTS).parts
    return parts[0] if len(parts) > 1 else None
