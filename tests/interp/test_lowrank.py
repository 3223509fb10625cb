"""The kernels of partial momentum in Triton's interpreter: against the float64 oracle and the torch reference."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from buckets import counters_at_zero, fenced
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.lowrank import MomentumRule, launch
from lowmem_kernels.tensors import Tensors
from lowmem_kernels.testing import PRECISIONS, Case, assert_same_bits, bytes_moved
from lowmem_kernels.testing.bytecount import count_bytes
from lowrank_buckets import (
    BF16_SR,
    FP32,
    MOMENTA,
    SECONDS,
    assert_same_momentum_buckets,
    make_momentum_bucket,
    step_and_check,
)

#: One of each layout; the aligned one has several blocks of rows and columns, which are not full.
FEW = [
    Case("empty", (0, 3)),
    Case("row", (1, 43)),
    Case("odd", (13, 11)),
    Case("experts_transposed", (2, 12, 23), "transposed", "transposed"),
    Case("misaligned", (11, 19), "misaligned", "misaligned"),
    Case("columns", (14, 24), "columns", "contiguous"),
    Case("aligned", (72, 40)),
]
VECTORS = [Case("scalar", ()), Case("vector", (37,)), Case("conv", (4, 3, 3, 3), "channels_last", "contiguous")]
FORMS = [(momentum, second) for momentum in MOMENTA for second in SECONDS]
RULES = [
    ("lowrank", "element", MomentumRule("gd")),
    ("lowrank", "factored", MomentumRule("fixed", refresh=3)),
    ("lowrank", "element", MomentumRule(residual_scale=0.25, update_clip=("rms", 0.5))),
    ("lowrank", "rows", MomentumRule(update_clip=("elem", 0.75))),
    ("none", "element", MomentumRule(update_clip=("rms", 0.5))),
    ("full", "rows", MomentumRule(update_clip=("rms", 0.5))),
]


def cases_of(momentum, second):
    by_matrix = momentum == "lowrank" or second in ("cols", "factored")
    return FEW if by_matrix else [*FEW, *VECTORS]


@pytest.mark.parametrize(("momentum", "second"), FORMS)
def test_every_form_and_layout(momentum, second):
    step_and_check(make_momentum_bucket(cases_of(momentum, second), momentum, second), backend="triton")


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p.state is torch.float32][1:], ids=str)
def test_every_dtype(precision):
    for form in (("lowrank", "element"), ("full", "rows")):
        step_and_check(make_momentum_bucket(FEW[2:], *form, precision), backend="triton")


@pytest.mark.parametrize(("momentum", "second", "rule"), RULES)
def test_every_rule(momentum, second, rule):
    step_and_check(make_momentum_bucket(FEW[1:], momentum, second), rule, backend="triton")


def test_long_rows():
    """Several programs beside each other, and rows that a program sweeps in more than one tile."""
    for form in (("none", "element"), ("full", "rows"), ("lowrank", "element")):
        step_and_check(make_momentum_bucket([Case("long", (3, 2064))], *form), backend="triton")


TRANSFORM = dict(inv_scale=2.0**-3, clip_value=2.0**-11, clip_coef=0.5, maximize=True)


@pytest.mark.parametrize("options", [dict(lr=torch.tensor(2.0**-9)), dict(lr=1), dict(betas=(0.0, 0.5))], ids=str)
def test_options(options):
    transform = GradTransform(
        **{k: torch.tensor(v) if k in ("inv_scale", "clip_coef") else v for k, v in TRANSFORM.items()}
    )
    for form in (("lowrank", "element"), ("full", "element")):
        step_and_check(make_momentum_bucket(FEW[-2:], *form), MomentumRule(), transform, TRANSFORM, "triton", **options)


@pytest.mark.parametrize("kind", ["zero", "rank 1"])
def test_rank_deficient_gradients(kind):
    """As the reference: a direction that is not there leaves its place to one that was."""
    results = []
    for backend in ("torch", "triton"):
        bucket = make_momentum_bucket([Case("a", (24, 40))], "lowrank", "element")
        bucket.states["lefts"][0].zero_()
        bucket.states["exp_avg_sqs"][0].zero_()
        for step in range(3):
            generator = torch.Generator().manual_seed(step if kind == "rank 1" else 0)
            outer = torch.outer(torch.randn(24, generator=generator), torch.randn(40, generator=generator))
            bucket.grads[0].copy_(outer * (kind == "rank 1" or step == 2))
            bucket.run(backend=backend, rule=MomentumRule(update_clip=("elem", 5.0)))
        results.append(bucket)
    for name in ("lefts", "rights"):
        torch.testing.assert_close(results[1].states[name][0], results[0].states[name][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(results[1].params[0], results[0].params[0], rtol=0, atol=1e-4)
    right = results[1].states["rights"][0]
    torch.testing.assert_close(right @ right.T, torch.eye(3), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in NumPy, which warns of NaN
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("momentum", "second", "clip"),
    [
        ("full", "element", None),
        ("full", "rows", None),
        ("none", "heads", None),
        ("full", "cols", None),
        ("full", "element", ("rms", 1.0)),
        ("lowrank", "element", None),
    ],
)
def test_what_is_not_finite_is_kept_as_in_torch(momentum, second, clip, bad):
    """Elements, rows or parameters, with their states; neighbours do as if alone."""
    rule, results = MomentumRule(update_clip=clip), []
    for backend in ("torch", "triton"):
        bucket = make_momentum_bucket([Case("a", (6, 8)), Case("b", (12, 16))], momentum, second)
        bucket.grads[1][3, 5] = bad
        before = [t.clone() for t in bucket.everything()]
        skipped = torch.tensor(4)
        bucket.run(rule=rule, transform=GradTransform(skipped=skipped), backend=backend)
        assert skipped.item() == 5
        results.append([now == old for now, old in zip(bucket.everything(), before, strict=True)])
        assert all(t.isfinite().all() for t in bucket.everything())
    assert all(map(torch.equal, *results))
    assert any(same.any() for same in results[0])


def test_found_inf_leaves_everything():
    bucket = make_momentum_bucket(FEW, "lowrank", "factored")
    before = [t.clone() for t in bucket.everything()]
    rule = MomentumRule(update_clip=("rms", 1.0))
    bucket.run(rule=rule, transform=GradTransform(found_inf=torch.tensor(1.0)), backend="triton")
    for now, old in zip(bucket.everything(), before, strict=True):
        assert_same_bits(now, old)


def test_two_runs_have_the_same_bits():
    """With lists that are remembered, too, whose tables are uploaded once; counters are 0 between launches."""
    one, two = (make_momentum_bucket([FEW[i] for i in (0, 3, 6)], "lowrank", "factored", BF16_SR) for _ in range(2))
    two.params, two.steps = Tensors(two.params), Tensors(two.steps)
    two.states = {name: Tensors(tensors) for name, tensors in two.states.items()}
    for _ in range(2):
        one.run(backend="triton")
        two.run(backend="triton")
    assert_same_momentum_buckets(two, one)


def test_neighbours_do_not_matter(monkeypatch):
    """Bits do not depend on what else is in the lists, another rank included."""
    rule = MomentumRule(update_clip=("rms", 0.5))
    together = make_momentum_bucket(FEW, "lowrank", "element", BF16_SR)
    whole = make_momentum_bucket(FEW, "lowrank", "element", BF16_SR)
    with counters_at_zero(monkeypatch, launch):
        together.run(rule=rule, backend="triton")
        for i in (2, 3, 6):
            alone = whole.part([i])
            alone.run(
                rule=rule, backend="triton", rounding=Rounding(True, whole.rounding().seed, [whole.rounding().uids[i]])
            )
            assert_same_momentum_buckets(alone, together.part([i]))


@pytest.mark.parametrize(("precision", "poison"), [(FP32, -1), (BF16_SR, 0x4242)], ids=["fp32_nan", "bf16_numbers"])
def test_nothing_outside_the_tensors_matters_or_changes(precision, poison):
    """Between 4 KB of garbage on both sides, and garbage between strided elements: same bits, no stores there."""
    for form in (("lowrank", "rows"), ("full", "element")):
        plain, fenced_in = (make_momentum_bucket(FEW[2:], *form, precision) for _ in range(2))
        fences = []
        for column in (fenced_in.params, fenced_in.grads, *fenced_in.states.values()):
            for i, tensor in enumerate(column):
                column[i], storage, outside = fenced(tensor, poison)
                fences.append((storage, outside, storage[outside].clone()))
        plain.run(backend="triton")
        fenced_in.run(backend="triton")
        assert_same_momentum_buckets(fenced_in, plain)
        for storage, outside, garbage in fences:
            assert_same_bits(storage[outside], garbage)


def test_autograd_sees_that_parameters_were_written():
    bucket = make_momentum_bucket(FEW, "full", "rows")
    versions = [p._version for p in bucket.params]
    bucket.run(backend="triton")
    assert [p._version for p in bucket.params] == [version + 1 for version in versions]


@pytest.mark.parametrize(
    ("momentum", "second", "rule", "count"),
    [
        ("none", "element", MomentumRule(), 1),
        ("full", "rows", MomentumRule(), 1),
        ("full", "heads", MomentumRule(), 3),
        ("full", "factored", MomentumRule(update_clip=("rms", 1.0)), 5),
        ("lowrank", "element", MomentumRule(), 6),
        ("lowrank", "factored", MomentumRule(update_clip=("rms", 1.0)), 8),
    ],
)
def test_launches_do_not_grow_with_parameters(momentum, second, rule, count, monkeypatch):
    """Launches are counted and not run; one layout. And nothing of a gradient's size is made."""
    launches, sizes, allocate = [], [], torch.empty
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launches.append(self.fn.__name__))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (sizes.append(allocate(*a, **k).numel()), allocate(*a, **k))[1])
    for parameters in (2, 30):
        bucket = make_momentum_bucket([Case("a", (40, 1000))] * parameters, momentum, second)
        launches.clear()
        bucket.run(rule=rule, backend="triton")
        assert len(launches) == count
    assert sum(sizes) <= 32 * (3 * 1040 + 1040 + 4 * 16**2 + 100)


@pytest.mark.parametrize(
    ("formula", "momentum", "second", "rule"),
    [
        ("lowrank", "lowrank", "element", MomentumRule()),
        ("lowrank_rows", "lowrank", "rows", MomentumRule()),
        ("lowrank_rms", "lowrank", "element", MomentumRule(update_clip=("rms", 1.0))),
        ("adamw", "full", "element", MomentumRule()),
        ("no_momentum", "none", "element", MomentumRule()),
        ("adam_mini", "full", "rows", MomentumRule()),
        ("adam_mini", "full", "heads", MomentumRule()),
    ],
)
def test_bytes(formula, momentum, second, rule):
    """g three times with factors, twice with sums of groups; p, v and m once."""
    shape = (32, 64)
    precision = PRECISIONS[3]
    assert precision.param is torch.bfloat16
    bucket = make_momentum_bucket([Case("case", shape)], momentum, second, precision)
    large = {k: v for k, v in bucket.states.items() if v[0].numel() == 32 * 64}
    named = {"params": bucket.params, "grads": bucket.grads, **large}
    with count_bytes(named) as traffic:
        bucket.run(rule=rule, backend="triton")
    state = 4
    read, written = bytes_moved(formula, 32 * 64, 2, state)
    assert sum(traffic.read[name] for name in named) == read
    assert sum(traffic.written[name] for name in named) == written
    assert traffic.read["params"] == traffic.written["params"] == 2 * 32 * 64
    assert traffic.written["grads"] == 0


def test_fixed_factors_save_a_read():
    """Between two power steps nothing looks at columns."""
    bucket = make_momentum_bucket([Case("a", (32, 64))], "lowrank", "element", PRECISIONS[3])
    bucket.steps[0].fill_(1.0)
    with count_bytes({"grads": bucket.grads}) as traffic:
        bucket.run(rule=MomentumRule("fixed"), backend="triton")
    assert traffic.read["grads"] == 2 * 2 * 32 * 64
    assert np.isfinite(bucket.params[0].float().numpy()).all()
