"""Random launches of the factored kernels: what is in the list, which dialect, and in which order tickets follow."""

from dataclasses import dataclass

import numpy as np
import torch

from buckets import FP32
from factored_buckets import DIALECTS, NAMES, Bucket, make_bucket
from lowmem_kernels.factored import launch
from lowmem_kernels.testing import Case, Precision
from lowmem_kernels.tickets import Order

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
#: Every kernel and every number of phases; each dialect and precision is compiled for several tiles and layouts, so
#: that there are no more than these.
NAMES_OF_DIALECTS = ("adalomo", "external", "torch", "came")
PRECISIONS = (FP32, BF16_SR)

#: Every phase in a launch of its own, which needs no waits: what all other orders have to equal.
PHASED = Order(bundle_bytes=1 << 62, ahead=0, reverse=False, phased=True)

_LAYOUTS = ("contiguous", "contiguous", "contiguous", "transposed", "misaligned", "columns")


@dataclass(frozen=True)
class RandomBucket:
    """A list of parameters: dialect, dtypes, shapes with layouts, and whether torch's floor under V is felt."""

    dialect: str
    precision: Precision
    cases: tuple[Case, ...]
    seed: int
    floor_is_felt: bool

    def make(self) -> Bucket:
        """The tensors, on the CPU."""
        bucket = make_bucket(self.cases, self.precision, self.seed, verb=DIALECTS[self.dialect][0])
        if self.floor_is_felt:
            for moment in (*bucket.rows, *bucket.cols):
                if moment is not None:
                    moment.zero_()
            for grad in bucket.grads:
                grad.mul_(1e-4)  # roots of V are then about as large as the floor
        return bucket

    def run(self, bucket: Bucket, monkeypatch, order: Order, steps: int) -> None:
        """Steps with tickets in this order; AdaLomo's second one takes over the sum of p² that the first has left."""
        verb, hyper = DIALECTS[self.dialect]
        options = dict(hyper)
        if self.dialect == "adalomo":
            options["param_sums"] = [torch.full((), torch.nan, device=p.device) for p in bucket.params]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "plan_order", lambda facts: order)
            for _ in range(steps):
                bucket.run(verb, backend="triton", **options)


def random_bucket(random: np.random.Generator, dialect: str, elements: int) -> RandomBucket:
    """A list of one to eight parameters with about this many elements together."""
    cases = []
    count = int(random.integers(1, 9))
    for i in range(count):
        shape = _random_shape(random, max(1, elements // count))
        layout = random.choice(_LAYOUTS)
        if len(shape) < 2 and layout == "transposed":
            layout = "contiguous"
        cases.append(Case(f"{i}_{layout}_{shape}", shape, str(layout), str(layout)))
    return RandomBucket(
        dialect,
        PRECISIONS[random.integers(len(PRECISIONS))],
        tuple(cases),
        int(random.integers(2**31)),
        dialect == "torch" and bool(random.integers(2)),
    )


def random_order(random: np.random.Generator) -> Order:
    """Any bundles, of one parameter or of all; nothing ahead or more than there is; forwards or backwards."""
    return Order(
        bundle_bytes=int(random.choice([0, 1 << 62, int(2 ** random.uniform(8, 25))])),
        ahead=int(random.choice([0, 1, 2, 7, 66, 132, 100_000])),
        reverse=bool(random.integers(2)),
        phased=False,
    )


def restore(bucket: Bucket, start: Bucket) -> None:
    """Give a bucket's tensors, which stay where they are, the values of another's."""
    for name in NAMES:
        for tensor, value in zip(getattr(bucket, name), getattr(start, name), strict=True):
            if tensor is not None and name != "grads":
                tensor.copy_(value)


def _random_shape(random: np.random.Generator, elements: int) -> tuple[int, ...]:
    """A vector, a matrix, or a stack of matrices; half of the rows are whole vectors of 16 bytes."""
    dims = int(random.choice([1, 2, 2, 2, 3, 4]))
    # sizes by a product of random shares of the elements
    shares = random.dirichlet(np.ones(dims))
    shape = [max(1, round(elements**share)) for share in shares]
    if random.integers(2):
        shape[-1] = max(8, shape[-1] // 8 * 8)
    return tuple(shape)
