"""What `sinkhorn_update_` makes of matrices whose rows are in several processes, for tests of both implementations."""

import pytest
import torch

from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.multinorm import NormRule, sinkhorn_update_
from lowmem_kernels.numerics import parity_tolerance
from pieces import Rows, each_bad, random_tensors

STEPS = 2

#: Of two processes the second has nothing of the third, of three the last has nothing of three of them.
SHAPES = [(40, 24), (7, 70), (1, 33), (4, 600), (3, 5, 16), (0, 6)]

#: Each with the sums of a step: of all columns ("m"), or of all matrices ("1").
RULES = {
    "sinkgd": (NormRule(scale=0.05), "mmmmm"),
    "once": (NormRule(("row", "col"), scale=0.05), "m"),
    "columns first": (NormRule(("col", "row"), scale=0.05), "m"),
    "rows": (NormRule(("row",), scale=0.05), ""),
    "columns": (NormRule(("col",), scale=0.05), "m"),
    "signs": (NormRule(("sign",), scale=0.05), ""),
    "signs, rows, columns": (NormRule(("sign", "row", "col"), scale=0.05), "m"),
    "frobenius": (NormRule(("row", "col", "frobenius"), scale=0.05), "m1"),
    "frobenius alone": (NormRule(("frobenius",), scale=0.05), "1"),
    "eps": (NormRule(("row", "col") * 2, scale=0.05, eps=0.7), "mm"),
    "momentum": (NormRule(scale=0.05, momentum=0.9), "mmmmm"),
    "momentum after": (NormRule(scale=0.05, momentum=0.9, nesterov=True, momentum_after=True), "mmmmm"),
    "table": (
        NormRule((*("row", "col") * 5, "row"), scale=0.18, row_threshold=0.5, momentum=0.9, nesterov=True),
        "1mmmmm",
    ),
}

each_rule = pytest.mark.parametrize("name", RULES)
each_cut = pytest.mark.parametrize(
    ("rows", "shapes"), [(Rows(2), SHAPES), (Rows(3), SHAPES), (Rows(2, deal=2), [(40, 24), (4, 600), (3, 8, 16)])],
    ids=["2", "3", "dealt"],
)  # fmt: skip


def as_it_is(tensor):
    return tensor


class Run:
    """Parameters with their momenta, in one process, which has all rows of them or some."""

    def __init__(self, name, shapes, dtype, cut, arrange):
        self.rule, self.cut = RULES[name][0], lambda tensor: arrange(cut(tensor))
        self.params = [self.cut(p) for p in random_tensors(shapes, dtype, 0)]
        self.exp_avgs = [torch.zeros(p.shape, dtype=dtype) for p in self.params] if self.rule.momentum else None
        self.steps = [torch.zeros(()) for _ in shapes]
        self.skipped = torch.zeros((), dtype=torch.int64)

    def step(self, grads, backend, pieces, **transform):
        sinkhorn_update_(
            self.params,
            [self.cut(g) for g in grads],
            self.steps,
            lr=1.0,
            weight_decay=0.1,
            rule=self.rule,
            exp_avgs=self.exp_avgs,
            pieces=pieces,
            transform=GradTransform(skipped=self.skipped, **transform),
            rounding=Rounding(self.params[0].dtype is torch.bfloat16, seed=5),
            backend=backend,
        )


def runs(name, rows, shapes, dtype, backend, change=lambda step, grads: grads, arrange=as_it_is, **transform):
    """(the run of one process, those of several, their meetings). Tensors lie in memory as ``arrange`` returns them."""

    def all_steps(run, pieces):
        for step in range(STEPS):
            run.step(change(step, random_tensors(shapes, dtype, step + 1)), backend, pieces, **transform)

    return rows.runs(shapes, lambda cut: Run(name, shapes, dtype, cut, arrange), all_steps)


def assert_pieces_do_what_the_whole_does(name, rows, shapes, backend, arrange=as_it_is):
    """In float32 within what two orders of summation may differ by; and the sums of a step."""
    whole, several, meetings = runs(name, rows, shapes, torch.float32, backend, arrange=arrange)
    for i, start in enumerate(random_tensors(shapes, torch.float32, 0)):
        found = rows.gathered([run.params[i] for run in several], whole.params[i])
        assert (found - whole.params[i]).norm() <= parity_tolerance(start, whole.params[i], STEPS), i
        if whole.exp_avgs is not None:
            moments = rows.gathered([run.exp_avgs[i] for run in several], whole.exp_avgs[i])
            torch.testing.assert_close(moments, whole.exp_avgs[i], rtol=1e-5, atol=1e-6)
        assert {int(run.steps[i]) for run in several} == {STEPS}
    lengths = {
        "m": sum(torch.Size(s[:-2]).numel() * s[-1] for s in shapes if backend == "torch" or 0 not in s),
        "1": sum(torch.Size(s[:-2]).numel() for s in shapes if backend == "torch" or 0 not in s),
    }
    assert [count for _, count in meetings.sums] == [lengths[kind] for kind in RULES[name][1]] * STEPS


def assert_bad_rows_stop_all(name, bad, backend, **transform):
    """A bad element in the rows of the last process: none of them moves that matrix, its momentum or its step."""
    rows, shapes = Rows(2), SHAPES[:2]

    def change(step, grads):
        if step == 1:
            grads[0][-1, 3] = bad
        return grads

    whole, several, _ = runs(name, rows, shapes, torch.float32, backend, change, **transform)
    for run in (whole, *several):
        assert [int(s) for s in run.steps] == [STEPS - 1, STEPS]
        assert int(run.skipped) == 1
    found = rows.gathered([run.params[0] for run in several], whole.params[0])
    start = random_tensors(shapes, torch.float32, 0)[0]
    assert (found - whole.params[0]).norm() <= parity_tolerance(start, whole.params[0], STEPS)


def assert_bad_rows_are_kept(name, bad, backend, **transform):
    """Of rules that decide about elements: where a bad element reaches, in whatever process, nothing moves."""
    rows, shapes = Rows(2), SHAPES[:2]

    def change(step, grads):
        if step == 1:
            grads[0][-1, 3] = bad
        return grads

    whole, several, _ = runs(name, rows, shapes, torch.float32, backend, change, **transform)
    for run in (whole, *several):
        assert [int(s) for s in run.steps] == [STEPS, STEPS]
    reached = {"rows": shapes[0][1], "columns": shapes[0][0], "signs": 1}[name]
    assert sum(int(run.skipped) for run in several) == int(whole.skipped) == reached
    found = rows.gathered([run.params[0] for run in several], whole.params[0])
    start = random_tensors(shapes, torch.float32, 0)[0]
    assert (found - whole.params[0]).norm() <= parity_tolerance(start, whole.params[0], STEPS)


def assert_noise_is_that_of_the_whole(name, rows, shapes, backend):
    """In bfloat16 nearly all elements are equal: sums differ in their last bits, and few results lie at a border."""
    whole, several, _ = runs(name, rows, shapes, torch.bfloat16, backend)
    differ = total = 0
    for i in range(len(shapes)):
        for lists in ("params", "exp_avgs"):
            if getattr(whole, lists) is not None:
                expected = getattr(whole, lists)[i]
                found = rows.gathered([getattr(run, lists)[i] for run in several], expected)
                differ += int((found != expected).sum())
                total += expected.numel()
    assert differ <= 3e-4 * total, (differ, total)


class PiecesContract:
    """What either implementation has to satisfy; each tier says which it is."""

    backend: str

    @each_rule
    @each_cut
    def test_pieces_do_what_the_whole_does(self, name, rows, shapes):
        assert_pieces_do_what_the_whole_does(name, rows, shapes, self.backend)

    @pytest.mark.parametrize("name", ["sinkgd", "momentum after", "signs"])
    @each_cut
    def test_noise_is_that_of_the_whole(self, name, rows, shapes):
        assert_noise_is_that_of_the_whole(name, rows, shapes, self.backend)

    @pytest.mark.parametrize("name", ["sinkgd", "columns first", "frobenius", "frobenius alone", "table"])
    @each_bad
    def test_bad_rows_stop_all(self, name, transform, bad):
        assert_bad_rows_stop_all(name, bad, self.backend, **transform)

    @pytest.mark.parametrize("name", ["rows", "columns", "signs"])
    @each_bad
    def test_bad_rows_are_kept(self, name, transform, bad):
        """By rules without a sum over all elements."""
        assert_bad_rows_are_kept(name, bad, self.backend, **transform)
