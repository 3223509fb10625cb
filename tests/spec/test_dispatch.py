"""Which implementation runs, what refuses and why, and that Triton is imported only where it is used."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowmem_kernels import choose, dispatch, why_not_triton
from lowmem_kernels.device import HOPPER, device_facts

CPU = [torch.zeros(1)]


def on(device, dtype=torch.float32):
    """Stands for a tensor on a device that this machine need not have: dispatch looks at nothing else."""
    return [SimpleNamespace(device=torch.device(device), dtype=dtype)]


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("LOWMEM_BACKEND", raising=False)


def test_cpu_takes_torch():
    assert choose("auto", CPU) == "torch"
    assert choose("torch", CPU) == "torch"
    assert choose("triton", []) == "torch"


def test_gpu_takes_triton():
    assert why_not_triton(on("cuda:1", torch.bfloat16)) is None
    assert choose("auto", on("cuda")) == "triton"
    assert choose("triton", on("cuda")) == "triton"
    assert choose("torch", on("cuda")) == "torch"


def test_gpu_without_triton_takes_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert choose("auto", on("cuda")) == "torch"
    with pytest.raises(RuntimeError, match=r"backend is 'triton', which cannot be used here: Triton is not installed"):
        choose("triton", on("cuda"))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"^backend is 'cuda'; allowed: 'auto', 'triton', 'torch'$"):
        choose("cuda", CPU)


def test_triton_on_the_cpu_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"backend is 'triton', which cannot be used here: .*TRITON_INTERPRET=1"):
        choose("triton", CPU)


def test_reasons(monkeypatch):
    assert "on meta, and kernels exist for NVIDIA and AMD GPUs" in why_not_triton([torch.zeros(1, device="meta")])
    assert "float64; allowed: float32, bfloat16, float16" in why_not_triton(on("cuda") + on("cuda", torch.float64))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_triton(CPU) is None
    assert choose("auto", CPU) == "torch"
    assert choose("triton", CPU) == "triton"
    assert "interpreter cannot follow addresses in GPU memory" in why_not_triton(on("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "on the CPU" in why_not_triton(CPU)


def test_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("LOWMEM_BACKEND", "torch")
    assert choose("auto", on("cuda")) == "torch"
    assert choose("triton", on("cuda")) == "triton"
    monkeypatch.setenv("LOWMEM_BACKEND", "triton")
    assert choose("torch", on("cuda")) == "torch"
    with pytest.raises(RuntimeError, match=r"the environment variable LOWMEM_BACKEND is 'triton', which cannot"):
        choose("auto", CPU)
    monkeypatch.setenv("LOWMEM_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"the environment variable LOWMEM_BACKEND is 'fast'; allowed: 'auto'"):
        choose("auto", CPU)


def test_implementation_modules():
    reference = dispatch.implementation("lowmem_kernels.elementwise", "auto", CPU)
    assert reference.__name__ == "lowmem_kernels.elementwise.reference"


def test_cpu_facts_are_assumed():
    assert device_facts(torch.device("cpu")) is HOPPER


PROGRAM = """
import sys
import torch
assert "triton" not in sys.modules, "torch itself imports Triton now: this test can show nothing"
import lowmem_kernels, lowmem_kernels.elementwise as e, lowmem_kernels.testing
p, g, m, v, t = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.tensor(0.0)
e.adamw_([p], [g], [m], [v], [t], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
e.scaled_update_([p], [g], [t], lr=0.1, weight_decay=0.0)
assert e.grad_stats([g]).tolist() == [3.0, 0.0]
assert abs(p[0].item() - 0.8) < 1e-6 and t.item() == 2, (p, t)
assert "triton" not in sys.modules
"""


def test_reference_never_imports_triton():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
