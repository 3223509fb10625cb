"""What factored verbs make of matrices whose rows are in several processes, for the tests of references and kernels."""

import pytest
import torch

from factored_buckets import CAME, RULES
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.factored import confidence_update_, factored_update_
from lowmem_kernels.numerics import parity_tolerance
from pieces import Rows, random_tensors

STEPS = 3

#: Of two processes the second has nothing of the third, of three the last has nothing of three of them.
SHAPES = [(40, 24), (7, 70), (1, 33), (4, 300), (3, 5, 16), (0, 6)]
DIALECTS = {name: options for name, options in RULES.items() if name != "torch"} | {"came": CAME}

each_dialect = pytest.mark.parametrize("dialect", DIALECTS)
each_cut = pytest.mark.parametrize(
    ("rows", "shapes"), [(Rows(2), SHAPES), (Rows(3), SHAPES), (Rows(2, deal=2), [(40, 24), (4, 300), (3, 8, 16)])],
    ids=["2", "3", "dealt"],
)  # fmt: skip


class Run:
    """Parameters with their states, in one process, which has all rows of them or some."""

    def __init__(self, dialect, shapes, dtype, cut):
        self.options = dict(DIALECTS[dialect])
        self.is_came = dialect == "came"
        self.cut = cut
        self.params = [cut(p, -2) for p in random_tensors(shapes, dtype, 0)]
        moment = dtype if dtype is torch.bfloat16 else torch.float32
        self.exp_avgs = [torch.zeros_like(p, dtype=moment) for p in self.params]
        rows = [cut(torch.zeros(s[:-1]), -1) for s in shapes]
        cols = [torch.zeros(s[:-2] + s[-1:]) for s in shapes]
        self.factors = [rows, cols] + ([[r.clone() for r in rows], [c.clone() for c in cols]] if self.is_came else [])
        self.steps = [torch.zeros(()) for _ in shapes]
        rule = self.options.get("rule")
        self.param_sums = None
        if rule is not None and rule.scale_parameter:
            self.param_sums = [torch.tensor(float("nan")) for _ in shapes]
        self.skipped = torch.zeros((), dtype=torch.int64)

    def step(self, grads, backend, pieces, **transform):
        options = {
            **self.options,
            "pieces": pieces,
            "transform": GradTransform(skipped=self.skipped, **transform),
            "rounding": Rounding(self.params[0].dtype is torch.bfloat16, seed=5),
            "backend": backend,
        }
        grads = [self.cut(g, -2) for g in grads]
        if self.is_came:
            confidence_update_(self.params, grads, self.exp_avgs, *self.factors, self.steps, **options)
            return
        if self.options["rule"].beta1 is not None:
            options["exp_avgs"] = self.exp_avgs
        factored_update_(self.params, grads, *self.factors, self.steps, param_sums=self.param_sums, **options)


def runs(dialect, rows, shapes, dtype, backend, change=lambda step, grads: grads, **transform):
    """(the run of one process, those of several, their meetings)."""

    def all_steps(run, pieces):
        for step in range(STEPS):
            run.step(change(step, random_tensors(shapes, dtype, step + 1)), backend, pieces, **transform)

    return rows.runs(shapes, lambda cut: Run(dialect, shapes, dtype, cut), all_steps)


def assert_pieces_do_what_the_whole_does(dialect, rows, shapes, backend):
    """In float32, of all tensors, within what two orders of summation may differ by; and one or two sums in a step."""
    whole, several, meetings = runs(dialect, rows, shapes, torch.float32, backend)
    for i, start in enumerate(random_tensors(shapes, torch.float32, 0)):
        found = rows.gathered([run.params[i] for run in several], whole.params[i], -2)
        assert (found - whole.params[i]).norm() <= parity_tolerance(start, whole.params[i], STEPS), i
        row_like, col_like = whole.factors[::2], whole.factors[1::2]
        for k, factor in enumerate(row_like):
            found = rows.gathered([run.factors[2 * k][i] for run in several], factor[i], -1)
            torch.testing.assert_close(found, factor[i], rtol=3e-6, atol=1e-9)
        for k, factor in enumerate(col_like):
            for run in several:
                torch.testing.assert_close(run.factors[2 * k + 1][i], factor[i], rtol=3e-6, atol=1e-9)
                # copies have to stay copies
                assert torch.equal(run.factors[2 * k + 1][i], several[0].factors[2 * k + 1][i])
        assert {int(run.steps[i]) for run in several} == {STEPS}
    columns = [torch.Size(s[:-2]).numel() * s[-1] for s in shapes if 0 not in s]
    matrices = [torch.Size(s[:-2]).numel() for s in shapes if 0 not in s]
    # of each parameter the sum of p², and in torch whether all is finite, which kernels see in the other sums
    first = 2 * sum(columns) + sum(matrices) + (2 if backend == "torch" else 1) * len(columns)
    expected = [first, sum(columns) + sum(matrices)] if whole.is_came else [first]
    assert [count for _, count in meetings.sums] == expected * STEPS


def assert_bad_rows_stop_all(dialect, bad, backend, **transform):
    """A bad element in the rows of the last process: none of them moves that matrix, its state or its step."""
    rows, shapes = Rows(2), SHAPES[:2]

    def change(step, grads):
        if step == 1:
            grads[0][-1, 3] = bad
        return grads

    whole, several, _ = runs(dialect, rows, shapes, torch.float32, backend, change, **transform)
    for run in (whole, *several):
        assert [int(s) for s in run.steps] == [STEPS - 1, STEPS]
        assert int(run.skipped) == 1
    found = rows.gathered([run.params[0] for run in several], whole.params[0], -2)
    start = random_tensors(shapes, torch.float32, 0)[0]
    assert (found - whole.params[0]).norm() <= parity_tolerance(start, whole.params[0], STEPS)


def assert_noise_is_that_of_the_whole(dialect, rows, shapes, backend):
    """In bfloat16 nearly all elements are equal: sums differ in their last bits, and few results lie at a border."""
    whole, several, _ = runs(dialect, rows, shapes, torch.bfloat16, backend)
    differ = total = 0
    for i in range(len(shapes)):
        for name in ("params", "exp_avgs"):
            expected = getattr(whole, name)[i]
            found = rows.gathered([getattr(run, name)[i] for run in several], expected, -2)
            differ += int((found != expected).sum())
            total += expected.numel()
    assert differ <= 3e-4 * total, (differ, total)
