"""Which implementation an optimizer runs, and that none of it needs Triton to be there."""

import os
import subprocess
import sys

import pytest
import torch

from optim.every import every_case
from optim.tensors import SMALL, Unchanged, assert_same_bits, make_params, set_gradients, take_steps, trained

#: Triton as it looks where it is not installed
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


@every_case
def test_auto_runs_torch_on_a_cpu(case):
    params, _ = trained(case, torch.bfloat16)
    others, _ = trained(case, torch.bfloat16, backend="torch")
    assert_same_bits(params, others)


@pytest.mark.parametrize("by", ["option", "environment"])
@every_case
def test_triton_on_a_cpu_says_why_it_cannot_run(case, by, monkeypatch):
    """Before the first parameter moves or has state, also where another group could have been updated."""
    params = make_params(names=SMALL)
    if by == "environment":
        monkeypatch.setenv("LOWMEM_BACKEND", "triton")
    backend = "triton" if by == "option" else "auto"
    optimizer = case.make([{"params": params[:1], "backend": "torch"}, {"params": params[1:]}], backend=backend)
    source = "backend" if by == "option" else "the environment variable LOWMEM_BACKEND"
    set_gradients(params, 0)
    with Unchanged(optimizer), pytest.raises(RuntimeError, match=rf"{source} is 'triton'.*CPU.*TRITON_INTERPRET=1"):
        optimizer.step()
    optimizer.param_groups[1]["backend"] = "torch"
    take_steps(optimizer, params, 1)


@every_case
def test_environment_replaces_auto_only(case, monkeypatch):
    params, _ = trained(case)
    monkeypatch.setenv("LOWMEM_BACKEND", "torch")
    others, _ = trained(case)
    assert_same_bits(params, others)
    monkeypatch.setenv("LOWMEM_BACKEND", "cuda")
    trained(case, backend="torch")
    params = make_params(names=SMALL)
    optimizer = case.make(params)
    set_gradients(params, 0)
    with Unchanged(optimizer), pytest.raises(ValueError, match="LOWMEM_BACKEND is 'cuda'; allowed: 'auto'"):
        optimizer.step()


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_every_optimizer_works_without_triton():
    code = """
import torch
from optim.cases import discover
from optim.tensors import trained
for case in discover():
    trained(case, torch.bfloat16)
    try:
        trained(case, backend="triton")
    except RuntimeError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise AssertionError(case.name)
print("done")
"""
    result = run_python(NO_TRITON + code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


def test_import_leaves_triton_alone():
    """It takes a second to import, and a CPU never needs it. (Torch imports it when an optimizer is made.)"""
    code = """
import sys
import torch
loaded = "triton" in sys.modules
import lowmem_optim
assert ("triton" in sys.modules) is loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
