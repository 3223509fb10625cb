"""What APOLLO makes of matrices whose rows are in several processes, for the tests."""

from dataclasses import asdict
from math import prod

import numpy as np
import pytest
import torch

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.numerics import parity_tolerance
from lowmem_kernels.projection import ApolloRule, Draw, apollo_update_, projection_matrix
from lowmem_kernels.projection.rule import moment_shape, norm_shape, sides_of
from lowmem_kernels.testing import assert_rounded
from lowmem_kernels.testing.oracles.projection import is_right, step, step_error
from pieces import Rows, random_tensors

STEPS = 20
REDRAW = 7

#: Tall, square, wide, not projected (both ways), stacks, empty. Half of the first two would be wide, and half of the
#: third would not be projected at rank 4. Of three processes the last has nothing of some.
SHAPES = [(40, 24), (24, 24), (7, 70), (1, 33), (4, 300), (33, 3), (3, 5, 16), (2, 16, 6), (0, 6)]

#: (rule, source of the projections).
DIALECTS = {
    "mini": (ApolloRule(1, "tensor", 128.0), "gaussian"),
    "rank_2_left": (ApolloRule(2, proj_type="left"), "gaussian"),
    "rank_4": (ApolloRule(4), "gaussian"),
    "free": (ApolloRule(4, growth_limit=None), "gaussian"),
    "right": (ApolloRule(4, proj_type="right"), "gaussian"),
    "left": (ApolloRule(4, proj_type="left"), "gaussian"),
    "left_tensor": (ApolloRule(4, "tensor", 4.0, "left", growth_limit=None), "gaussian"),
    "reverse": (ApolloRule(4, proj_type="reverse_std"), "gaussian"),
    "signs": (ApolloRule(8), "rademacher"),
    "torch": (ApolloRule(4), "torch"),
}

#: Rank 1 by channels, of which each factor is divided by a single number. Its terms can cancel, and then another order
#: of summation is seen in all of the channel: two runs part, and each step is held against float64 by itself.
BY_CHANNEL = {
    "channels": (ApolloRule(1), "gaussian"),
    "channels_right": (ApolloRule(1, proj_type="right"), "gaussian"),
    "channels_left_free": (ApolloRule(1, proj_type="left", growth_limit=None), "gaussian"),
}

HYPER = {"lr": 1e-2, "weight_decay": 0.1}
SEED = 3

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
    """Parameters with their states, in one process, which has all rows of them or some; ``past``: after each step."""

    def __init__(self, dialect, shapes, dtype, cut, arrange):
        self.rule, self.source = (DIALECTS | BY_CHANNEL)[dialect]
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
        self.past = [self._copies()]

    def _copies(self):
        return [[x.clone() for x in tensors] for tensors in (self.params, *self.moments, self.norms)]

    def step(self, grads, epoch, backend, pieces=None, **transform):
        apollo_update_(
            self.params, [self.cut(g) for g in grads], *self.moments, self.norms, self.epochs, self.steps,
            **HYPER, rule=self.rule, draw=Draw(self.source, SEED, epoch=epoch), pieces=pieces,
            transform=GradTransform(skipped=self.skipped, **transform),
            rounding=Rounding(self.params[0].dtype is torch.bfloat16, seed=5), backend=backend,
        )  # fmt: skip
        self.past.append(self._copies())


def epoch_of(step, redraw):
    """Projections are redrawn every ``redraw`` steps."""
    return 1 + step // redraw


def runs(
    dialect, rows, shapes, dtype, steps, backend, change=lambda step, grads: grads, arrange=as_it_is, redraw=REDRAW,
    **transform,
):  # fmt: skip
    """(the run of one process, those of several, their meetings). Tensors lie in memory as ``arrange`` returns them."""

    def all_steps(run, pieces):
        for k in range(steps):
            grads = change(k, random_tensors(shapes, dtype, k + 1))
            run.step(grads, epoch_of(k, redraw), backend, pieces, **transform)

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


def assert_sums(meetings, rule, shapes, backend, steps):
    """Those that have numbers at all."""
    totals = [sum(counts) for counts in zip(*[numbers_summed(shape, rule, backend) for shape in shapes], strict=True)]
    assert [count for _, count in meetings.sums] == [total for total in totals if total] * steps


def assert_pieces_do_what_the_whole_does(dialect, rows, shapes, backend, steps=STEPS, **how):
    """In float32, and with one sum in a step, or two of the kernels."""
    whole, several, meetings = runs(dialect, rows, shapes, torch.float32, steps, backend, **how)
    assert_same(rows, shapes, whole, several, steps, [steps] * len(shapes))
    assert_sums(meetings, whole.rule, shapes, backend, steps)


def assert_each_step_is_exact(dialect, rows, shapes, backend, steps=STEPS, redraw=REDRAW):
    """In float32, of one process and of several: every step, from where they are, within the error of its sums.

    Returns the smallest R of a channel that there was, in units of the sum of its terms' sizes.
    """
    whole, several, meetings = runs(dialect, rows, shapes, torch.float32, steps, backend, redraw=redraw)
    assert_sums(meetings, whole.rule, shapes, backend, steps)
    options = {**asdict(whole.rule), **HYPER, "disable_nl": whole.rule.growth_limit is None}
    least = 1.0

    def gathered(k, i):
        """What the processes have of parameter i after k steps: p, M, V and its norm."""
        *tensors, norms = zip(*[[column[i] for column in run.past[k]] for run in several], strict=True)
        likes = [column[i] for column in whole.past[k][:3]]
        cuts = (True, *(moments_are_cut(shapes[i], whole.rule),) * 2)
        pieces = [rows.gathered(t, like) if cut else t[0] for t, like, cut in zip(tensors, likes, cuts, strict=True)]
        return [*pieces, norms[0]]

    for k in range(steps):
        grads = random_tensors(shapes, torch.float32, k + 1)
        for i, shape in enumerate(shapes):
            draw = Draw(whole.source, SEED, [i], epoch_of(k, redraw))
            made = dict(rank=whole.rule.rank, draw=draw, proj_type=whole.rule.proj_type)
            project, g = (x.double().numpy() for x in (projection_matrix(shape, **made), grads[i]))
            turn = (lambda x: x.T) if is_right(shape, whole.rule.proj_type) else (lambda x: x)
            least = min(least, np.min(np.abs(project @ turn(g)) / (np.abs(project) @ np.abs(turn(g)))))
            for of in (lambda k, i: [column[i] for column in whole.past[k]], gathered):
                *before, last = (x.double().numpy() for x in of(k, i))
                w, first, second = map(turn, before)
                *new, _ = step(w, turn(g), first, second, float(last), k + 1, project, options)
                errors = step_error(w, turn(g), first, second, k + 1, project, options, new)
                for found, exact, error in zip(of(k + 1, i)[:3], new, errors, strict=True):
                    assert_rounded(found, *[torch.from_numpy(turn(x).copy()) for x in (exact, error)], stochastic=False)
    return least


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
