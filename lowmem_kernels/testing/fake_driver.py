"""A stand-in for a GPU driver: kernels are specialized and compiled as on a GPU, but never launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from lowmem_kernels import dispatch
from lowmem_kernels.testing.aot import TARGETS

# a negative number per driver keeps the kernels it compiles apart from those of real devices and of other targets
_device_numbers = count(-1, step=-1)


class Launch(NamedTuple):
    """One launch: the kernel's name and its grid."""

    kernel: str
    grid: tuple[int, int, int]


class FakeDriver:
    """What Triton's runtime asks of a driver, for a device that does not exist; made by `fake_driver`.

    launches: what a GPU would have been given, in order.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.launches: list[Launch] = []
        self.utils = _Utils()
        self._target = target
        self._device = next(_device_numbers)
        self._kernels: set[JITFunction] = set()

    def count_launches(self, kernel: str | None = None) -> int:
        """Number of launches so far, of the kernel of that name or of all."""
        return sum(kernel in (None, launch.kernel) for launch in self.launches)

    def count_variants(self, kernel: JITFunction) -> int:
        """Number of specializations of `kernel` compiled so far; each costs a user a compilation."""
        return len(kernel.device_caches[self._device][0]) if self._device in kernel.device_caches else 0

    def forget_kernels(self) -> None:
        """Drop the kernels compiled for this device from the caches of the functions launched on it."""
        for kernel in self._kernels:
            kernel.device_caches.pop(self._device, None)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Make the function that Triton calls to launch one compiled kernel."""
        self._kernels.add(source.fn)

        def launch(grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
            self.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z)))

        return launch

    def get_current_device(self) -> int:
        """Number of the device, negative and unlike that of any other."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """Number of the stream; there is one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Target that kernels are compiled for."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Device that tensors live on."""
        return torch.device("cpu")


class _Utils:
    """A device that accepts every kernel: resources are the business of `inspect_kernel`."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        module, function, registers, spills, max_threads = 1, 1, 0, 0, 1024
        return module, function, registers, spills, max_threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


@contextmanager
def fake_driver(target_name: str = "sm_90") -> Iterator[FakeDriver]:
    """Let `kernel[grid](...)` and backend="triton" on CPU tensors do everything but run, as if on TARGETS[target_name].

        with fake_driver() as gpu:
            optimizer.step()
        assert gpu.count_launches() == 1

    Arguments are specialized on their real values and addresses and kernels are compiled, so variants can be counted
    and the host's cost of a launch timed; outputs stay as they were. Has no effect under TRITON_INTERPRET=1.

    Leaving the block puts the former driver back and removes what was launched inside from `kernel.device_caches`, so
    that a later launch on a GPU finds nothing to mistake for its own; even inside, kernels are cached under a device
    number that no GPU has. Triton's cache on disk keeps the binaries, which are real.
    Raises KeyError for an unknown target.
    """
    fake = FakeDriver(TARGETS[target_name])
    # not `driver.active`, which would look for a GPU and raise where there is none
    former = driver._active
    driver.set_active(fake)
    try:
        with patch.object(dispatch, "why_not_triton", lambda tensors: None):
            yield fake
    finally:
        driver.set_active(former)
        fake.forget_kernels()
