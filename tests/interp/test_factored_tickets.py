"""Tickets of the factored kernels in any order that the waits allow give the same bits; in any other, one is missed."""

import pytest
import torch

from factored_buckets import DIALECTS, assert_same_buckets, make_bucket
from lowmem_kernels import GradTransform
from lowmem_kernels.factored import launch
from lowmem_kernels.factored.kernels import adafactor, came
from lowmem_kernels.testing import Case
from ticket_contract import Family

#: One tile and layout, so one launch; two groups, three slabs, two matrices.
CASES = [Case("matrix", (17, 72)), Case("vector", (8,)), Case("stack", (2, 3, 72)), Case("last", (2, 72))]
every_kernel = pytest.mark.parametrize("name", ["external", "torch", "came"])


def step(name):
    """A step of a dialect; the floor of torch's is felt by some elements."""
    verb, hyper = DIALECTS[name]
    bucket = make_bucket(CASES, verb=verb)
    transform = GradTransform(clip_coef=torch.tensor(3e-3 if name == "torch" else 1.0))
    bucket.run(verb, backend="triton", **{**hyper, "transform": transform})
    return bucket


FAMILY = Family(launch, (adafactor, came), "_factored_kernel", step, assert_same_buckets)


@pytest.fixture(autouse=True)
def _fresh_caches():
    yield from FAMILY.fresh_caches()


@every_kernel
def test_bits_do_not_depend_on_the_order(name, monkeypatch):
    FAMILY.check_orders(name, monkeypatch, seeds=3)


@every_kernel
def test_every_wait_is_needed_and_there(name, monkeypatch):
    """Four parameters with a wait between any two phases, and two that wait for a slot of the scratch."""
    phases = {"external": 3, "torch": 4, "came": 5}[name]
    of_vectors = {"external": 3, "torch": 3, "came": 4}[name]
    FAMILY.check_waits(name, monkeypatch, 3 * (phases - 1) + (of_vectors - 1) + 2)


@every_kernel
def test_a_wait_that_is_deleted_is_found(name, monkeypatch):
    FAMILY.check_deleted_waits(name, monkeypatch)


def test_one_launch_and_phases_are_the_same_kernel(monkeypatch):
    FAMILY.check_launches("external", monkeypatch, 3 * len(CASES))
