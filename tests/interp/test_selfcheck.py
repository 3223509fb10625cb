"""The self-check of `lowmem doctor` on the kernels: it passes, and a kernel that is off a little fails."""

import pytest

import lowmem_optim
from lowmem_kernels.elementwise import launch
from lowmem_optim.conformance import Subject, self_check
from lowmem_optim.conformance.selfcheck import how
from optim.cases import exported


def test_it_compares_the_kernels():
    assert how("cpu")[0] == "triton"


@pytest.mark.parametrize("name", sorted(exported()))
def test_kernels_equal_the_reference(name):
    checks = list(self_check([Subject(name, getattr(lowmem_optim, name))]))
    assert [check.dtype for check in checks] == ["float32", "bfloat16"]
    assert all(check.ok for check in checks), checks


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    """Weight decay of 0.1 % more, in the launch and not in the reference, of which the optimizer knows nothing."""
    right = launch.scaled_update_

    def wrong(*args, weight_decay, **options):
        return right(*args, weight_decay=1.001 * weight_decay, **options)

    monkeypatch.setattr(launch, "scaled_update_", wrong)
    single, half = self_check([Subject("Lomo", lowmem_optim.Lomo)])
    assert single.times > 1
    # of each step 5e-5 of a parameter, which is rounded otherwise in 5e-5 / 2**-8 of all elements
    assert half.times > 1
    assert not single.ok
    assert not half.ok
