"""A few of the random launches of tests/gpu/test_tickets.py in the interpreter: in any order the bits of the phases."""

import numpy as np
import pytest

from factored_buckets import assert_same_buckets
from random_tickets import NAMES_OF_DIALECTS, PHASED, PRECISIONS, random_bucket, random_order, restore


@pytest.mark.parametrize("dialect", NAMES_OF_DIALECTS)
def test_random_orders_have_the_bits_of_the_phased_form(dialect, monkeypatch):
    random = np.random.default_rng(NAMES_OF_DIALECTS.index(dialect))
    chosen = random_bucket(random, dialect, elements=300)
    steps = 2 if dialect == "adalomo" else 1
    start, phased, bucket = (chosen.make() for _ in range(3))
    chosen.run(phased, monkeypatch, PHASED, steps)
    for _ in range(2):
        restore(bucket, start)
        assert_same_buckets(bucket, start)
        chosen.run(bucket, monkeypatch, random_order(random), steps)
        assert_same_buckets(bucket, phased)


def test_random_launches_are_of_many_kinds():
    """Dialects and layouts all occur, lists differ, and the floor of torch's is felt by some of them."""
    random = np.random.default_rng(0)
    chosen = [random_bucket(random, "torch", elements=10_000) for _ in range(60)]
    assert {len(bucket.cases) for bucket in chosen} == set(range(1, 9))
    assert {len(case.shape) for bucket in chosen for case in bucket.cases} == {1, 2, 3, 4}
    assert len({case.param_layout for bucket in chosen for case in bucket.cases}) == 4
    assert {bucket.floor_is_felt for bucket in chosen} == {False, True}
    assert {bucket.precision for bucket in chosen} == set(PRECISIONS)
    orders = {random_order(random) for _ in range(200)}
    assert len(orders) > 50
    assert not any(order.phased for order in orders)
