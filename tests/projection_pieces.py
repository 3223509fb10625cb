"""What APOLLO makes of matrices whose rows are in several processes, for the tests."""

from math import prod

import pytest
import torch

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.numerics import parity_tolerance
from lowmem_kernels.projection import ApolloRule, Draw, apollo_update_
from lowmem_kernels.projection.rule import moment_shape, norm_shape, sides_of
from pieces import Rows, random_tensors

STEPS = 20

#: Tall, square, wide, not projected (both ways), stacks, empty. Half of the first two would be wide, and half of the
#: third would not be projected at rank 4. Of three processes the last has nothing of some.
SHAPES = [(40, 24), (24, 24), (7, 70), (1, 33), (4, 300), (33, 3), (3, 5, 16), (2, 16, 6), (0, 6)]

#: (rule, source of the projections). At rank 1 not by channels: their factors are divided by one number each, in which
#: 300 terms can cancel to 1e-4 of their size, and then another order of summation is seen in all of the channel.
DIALECTS = {
    "mini": (ApolloRule(1, "tensor", 128.0), "gaussian"),
    "rank_4": (ApolloRule(4), "gaussian"),
    "free": (ApolloRule(4, growth_limit=None), "gaussian"),
    "right": (ApolloRule(4, proj_type="right"), "gaussian"),
    "left": (ApolloRule(4, proj_type="left"), "gaussian"),
    "left_tensor": (ApolloRule(4, "tensor", 4.0, "left", growth_limit=None), "gaussian"),
    "reverse": (ApolloRule(4, proj_type="reverse_std"), "gaussian"),
    "signs": (ApolloRule(8), "rademacher"),
    "torch": (ApolloRule(4), "torch"),
}

each_dialect = pytest.mark.parametrize("dialect", DIALECTS)
each_cut = pytest.mark.parametrize(
    ("rows", "shapes"),
    [(Rows(2), SHAPES), (Rows(3), SHAPES), (Rows(2, deal=2), [(40, 24), (24, 24), (8, 70), (4, 300), (3, 8, 16)])],
    ids=["2", "3", "dealt"],
)


def moments_are_cut(shape, rule):
    """Whether the moments of such matrices have the rows that are in a process."""
    sides = sides_of(shape, rule.rank, rule.proj_type, False)
    return sides.right or not sides.projected


def numbers_summed(shape, rule, backend):
    """How many numbers of such matrices each sum over processes has, of which the reference takes one."""
    sides = sides_of(shape, rule.rank, rule.proj_type, False)
    channels, tensor = sides.matrices * sides.channels, rule.scale_type == "tensor"
    if sides.projected and not sides.right:
        if backend == "torch":
            return (channels * (sides.rank + 1),)
        # projections start at multiples of 4, and each parameter has its sum of squares
        return (-(-channels * sides.rank // 4) * 4 + channels + 1, 0)
    if backend == "torch":
        return (sides.matrices * 3 if tensor else sides.matrices * 2 if sides.right else 3 * channels,)
    if tensor or sides.right:
        return (1, sides.matrices * (3 if tensor else 1))
    return (1 + channels, sides.matrices + 2 * channels)


def as_it_is(tensor):
    return tensor


class Run:
    """Parameters with their states, in one process, which has all rows of them or some."""

    def __init__(self, dialect, shapes, dtype, cut, arrange):
        self.rule, self.source = DIALECTS[dialect]
        self.cut = lambda tensor: arrange(cut(tensor))
        self.params = [self.cut(p) for p in random_tensors(shapes, dtype, 0)]
        moment = dtype if dtype is torch.bfloat16 else torch.float32
        self.moments = [[], []]
        for moments in self.moments:
            for shape in shapes:
                zeros = torch.zeros(moment_shape(shape, self.rule), dtype=moment)
                moments.append(cut(zeros) if moments_are_cut(shape, self.rule) else zeros)
        self.norms = [torch.zeros(norm_shape(shape, self.rule)) for shape in shapes]
        self.epochs = [torch.zeros(()) for _ in shapes]
        self.steps = [torch.zeros(()) for _ in shapes]
        self.skipped = torch.zeros((), dtype=torch.int64)

    def step(self, grads, epoch, backend, pieces=None, **transform):
        apollo_update_(
            self.params, [self.cut(g) for g in grads], *self.moments, self.norms, self.epochs, self.steps,
            lr=1e-2, weight_decay=0.1, rule=self.rule, draw=Draw(self.source, 3, epoch=epoch), pieces=pieces,
            transform=GradTransform(skipped=self.skipped, **transform),
            rounding=Rounding(self.params[0].dtype is torch.bfloat16, seed=5), backend=backend,
        )  # fmt: skip


def runs(
    dialect, rows, shapes, dtype, steps, backend, change=lambda step, grads: grads, arrange=as_it_is, redraw=7,
    **transform,
):  # fmt: skip
    """(the run of one process, those of several, their meetings). Tensors lie in memory as ``arrange`` returns them.

    Projections are redrawn every ``redraw`` steps.
    """

    def all_steps(run, pieces):
        for step in range(steps):
            grads = change(step, random_tensors(shapes, dtype, step + 1))
            run.step(grads, 1 + step // redraw, backend, pieces, **transform)

    return rows.runs(shapes, lambda cut: Run(dialect, shapes, dtype, cut, arrange), all_steps)


def assert_same(rows, shapes, whole, several, steps, counts):
    """Everything that there is, within what two orders of summation may differ by; and copies that are copies."""
    for i, (shape, start) in enumerate(zip(shapes, random_tensors(shapes, torch.float32, 0), strict=True)):
        found = rows.gathered([run.params[i] for run in several], whole.params[i])
        assert (found - whole.params[i]).norm() <= parity_tolerance(start, whole.params[i], steps), shape
        for moments in zip(*[run.moments for run in (whole, *several)], strict=True):
            expected, *parts = [of_run[i] for of_run in moments]
            if moments_are_cut(shape, whole.rule):
                parts = [rows.gathered(parts, expected)]
            assert all(torch.equal(part, parts[0]) for part in parts)
            torch.testing.assert_close(parts[0], expected, rtol=1e-4, atol=1e-6)
        for run in several:
            torch.testing.assert_close(run.norms[i], whole.norms[i], rtol=1e-4, atol=1e-6)
            assert torch.equal(run.norms[i], several[0].norms[i])
            assert run.epochs[i] == whole.epochs[i]
            assert int(run.steps[i]) == counts[i]


def assert_pieces_do_what_the_whole_does(dialect, rows, shapes, backend, steps=STEPS, **how):
    """In float32, and with one sum in a step, or two of the kernels."""
    whole, several, meetings = runs(dialect, rows, shapes, torch.float32, steps, backend, **how)
    assert_same(rows, shapes, whole, several, steps, [steps] * len(shapes))
    totals = [sum(counts) for counts in zip(*[numbers_summed(s, whole.rule, backend) for s in shapes], strict=True)]
    assert [count for _, count in meetings.sums] == [total for total in totals if total] * steps


def assert_bad_rows_stop_all(dialect, bad, backend, **transform):
    """A bad element in the rows of the last process: none of them moves that matrix, its state or its step."""
    rows, shapes, steps = Rows(2), [(40, 24), (8, 70), (4, 300), (40, 24), (8, 70)], 4

    def change(step, grads):
        if step == 1:
            for grad in grads[:3]:
                grad[-1, 3] = bad
        return grads

    whole, several, _ = runs(dialect, rows, shapes, torch.float32, steps, backend, change, **transform)
    assert_same(rows, shapes, whole, several, steps, [steps - 1] * 3 + [steps] * 2)
    assert [int(run.skipped) for run in (whole, *several)] == [3] * 3


def assert_found_inf_stops_all(dialect, backend):
    """An overflow that processes have agreed on: nothing moves, and no collective is left out."""
    rows, shapes = Rows(2), [(40, 24), (8, 70), (4, 300)]
    found_inf = torch.ones(())
    whole, several, meetings = runs(dialect, rows, shapes, torch.float32, 1, backend, found_inf=found_inf)
    for run in (whole, *several):
        for tensors in (*run.moments, run.norms, run.epochs, run.steps):
            assert not any(t.any() for t in tensors)
    for i, start in enumerate(random_tensors(shapes, torch.float32, 0)):
        assert torch.equal(rows.gathered([run.params[i] for run in several], start), start)
    assert len(meetings.sums) == (0 if backend == "torch" else 2)


def assert_noise_is_that_of_the_whole(dialect, rows, shapes, backend):
    """In bfloat16 nearly all elements are equal: sums differ in their last bits, and few results lie at a border."""
    whole, several, _ = runs(dialect, rows, shapes, torch.bfloat16, 2, backend)
    differ = total = 0
    for i, shape in enumerate(shapes):
        cut = moments_are_cut(shape, whole.rule)
        for of_run, is_cut in ((lambda r: r.params, True), *[(lambda r, k=k: r.moments[k], cut) for k in (0, 1)]):
            expected, *parts = [of_run(run)[i] for run in (whole, *several)]
            found = rows.gathered(parts, expected) if is_cut else parts[0]
            differ += int((found != expected).sum())
            total += prod(expected.shape)
    assert differ <= 1e-3 * total, (differ, total)
