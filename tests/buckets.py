"""A bucket of tensors, as an optimizer hands it to a verb. The same arguments make equal buckets."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lowmem_kernels import Rounding, table
from lowmem_kernels.elementwise import adamw_, scaled_update_
from lowmem_kernels.testing import SHAPES, Precision, assert_same_bits, make_tensors

ADAMW = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SCALED_UPDATE = dict(lr=3e-2, weight_decay=0.1)
FP32 = Precision(torch.float32, torch.float32, torch.float32)
SEED = 2**40 + 17
#: One of each layout and several sizes, for tests of what does not depend on more.
VARIED = [
    case
    for case in SHAPES
    if case.name
    in ("scalar", "empty", "not_16", "tile_plus_1", "conv", "conv_channels_last", "transposed_param", "misaligned")
]
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")


class Lists:
    """Lists of tensors, one entry for each parameter (of `cases`, for `only`): what buckets of all families are."""

    #: The lists, in the order of ``columns``.
    names: ClassVar[tuple[str, ...]]

    def columns(self):
        """The lists in the order of ``names``."""
        return [getattr(self, name) for name in self.names]

    def copies(self):
        """The lists, as contiguous clones."""
        return [
            [t if t is None else t.clone(memory_format=torch.contiguous_format) for t in column]
            for column in self.columns()
        ]

    def only(self, indices):
        """A bucket of some of the same tensors; their places in the run's order, and so their noise, stay."""
        lists = ([x[i] for i in indices] for x in (*self.columns(), self.cases))
        return type(self)(*lists, self.precision)

    def uids(self, indices=None):
        # that use all 64 bits, the sign included
        indices = range(len(self.params)) if indices is None else indices
        return [(-1) ** i * (i * (2**33 + 3) + 5) for i in indices]

    def rounding(self, indices=None):
        return Rounding(self.precision.stochastic, SEED, self.uids(indices))


def assert_same_lists(names, actual, expected):
    """Every tensor of two buckets, or of two results of ``copies``, has the same bits."""
    actual, expected = (x.columns() if isinstance(x, Lists) else x for x in (actual, expected))
    for name, column, other in zip(names, actual, expected, strict=True):
        for i, (a, b) in enumerate(zip(column, other, strict=True)):
            assert_same_bits(a, b, f"{name}[{i}]")


@dataclass
class Bucket(Lists):
    names = NAMES
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    precision: Precision

    def adamw(self, **options):
        adamw_(*self.columns(), **{"rounding": self.rounding(), **ADAMW, **options})

    def scaled_update(self, **options):
        options = {"rounding": self.rounding(), **SCALED_UPDATE, **options}
        scaled_update_(self.params, self.grads, self.steps, **options)

    def run(self, verb, **options):
        getattr(self, verb)(**options)


def make_bucket(cases, precision=FP32, seed=0, fresh=False):
    """One parameter per case with states of a run under way, or zeros where ``fresh``; every step counter differs."""
    bucket = Bucket([], [], [], [], [], precision)
    for i, case in enumerate(cases):
        param, grad = make_tensors(case, precision.param, seed + i, grad_dtype=precision.grad)
        _, past = make_tensors(case, torch.float32, seed + i + 1000)
        past = torch.zeros(case.shape) if fresh else past.clone(memory_format=torch.contiguous_format)
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.exp_avgs.append((0.3 * past).to(precision.state))
        bucket.exp_avg_sqs.append((0.5 * past**2).to(precision.state))
        bucket.steps.append(torch.tensor(0.0 if fresh else float(3 * i)))
    return bucket


def set_gradients(bucket, cases, seed):
    """Replace the values of the gradients, in place."""
    for i, (case, grad) in enumerate(zip(cases, bucket.grads, strict=True)):
        values = make_tensors(case, bucket.precision.param, seed + i, grad_dtype=bucket.precision.grad)[1]
        (grad if case.grad_layout != "expanded" else grad[..., :1]).copy_(
            values if case.grad_layout != "expanded" else values[..., :1]
        )


assert_same_buckets = partial(assert_same_lists, NAMES)


@contextmanager
def counters_at_zero(monkeypatch, launch):
    """Every launch by the module ``launch`` finds the counters at zero and leaves them so."""
    used = []

    def remembered(rows, device):
        used.append(table.counters(rows, device))
        assert not used[-1].any()
        return used[-1]

    monkeypatch.setattr(launch, "counters", remembered)
    yield
    assert not any(buffer.any() for buffer in used)


def fenced(tensor, poison):
    """A copy with the same strides and alignment inside a larger buffer of garbage: (copy, buffer, outside of copy)."""
    margin = 4096 // tensor.element_size()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    extent = extent if tensor.numel() else 0
    phase = tensor.data_ptr() % 16 // tensor.element_size()
    storage = torch.zeros(2 * margin + extent + 8, dtype=tensor.dtype)
    start = margin + (phase - (storage.data_ptr() % 16) // tensor.element_size()) % (16 // tensor.element_size())
    storage.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).fill_(poison)
    inside = torch.zeros(len(storage), dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), start).fill_(True)
    copy = storage.as_strided(tensor.shape, tensor.stride(), start)
    if 0 in tensor.stride():
        copy = copy.narrow(-1, 0, 1).copy_(tensor.narrow(-1, 0, 1)).expand(tensor.shape)
    else:
        copy.copy_(tensor)
    assert copy.data_ptr() % 16 == tensor.data_ptr() % 16 or not tensor.numel()
    return copy, storage, ~inside


def moved(tensor, device):
    """A copy on another device with the same strides, storage offset and alignment."""
    base = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return torch.as_strided(base.to(device, copy=True), tensor.shape, tensor.stride(), tensor.storage_offset())
