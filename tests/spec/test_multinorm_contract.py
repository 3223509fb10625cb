"""What the multi-normalization verbs promise besides numbers: what is skipped, kept and refused; the same bits."""

import pytest
import torch

from buckets import FP32
from lowmem_kernels import GradTransform, Rounding
from lowmem_kernels.multinorm import NormRule, rank1_apply_, sinkhorn_scales, sinkhorn_update_
from lowmem_kernels.multinorm.rule import keeps_elements, steps_of, sweeps_of
from lowmem_kernels.testing import SHAPES, Precision, assert_same_bits
from multinorm_buckets import HYPER, RULES, assert_same_buckets, make_bucket

BF16_SR = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, stochastic=True)
FEW = [case for case in SHAPES if case.name in ("empty", "block", "odd_matrix", "transposed_param", "experts", "row")]
PLACES = {case.name: i for i, case in enumerate(FEW)}
every_rule = pytest.mark.parametrize("name", RULES)
every_precision = pytest.mark.parametrize("precision", [FP32, BF16_SR], ids=str)
WHOLE = [name for name, rule in RULES.items() if not keeps_elements(rule)]
SINGLE = [name for name, rule in RULES.items() if keeps_elements(rule)]


@every_precision
@pytest.mark.parametrize("clip_value", [None, 1e-3])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_a_bad_element_stops_its_parameter(name, value, clip_value, precision):
    """It keeps everything and counts as one; the others are updated as without it."""
    bad, good = make_bucket(FEW, precision), make_bucket(FEW, precision)
    spoiled = [PLACES[n] for n in ("block", "experts", "transposed_param")]
    bad.grads[PLACES["block"]][77] = value
    bad.grads[PLACES["experts"]][1, 2, 3] = value
    bad.grads[PLACES["transposed_param"]][26, 18] = value
    before, skipped = bad.copies(), torch.tensor(7)
    bad.run(RULES[name], transform=GradTransform(clip_value=clip_value, skipped=skipped))
    good.run(RULES[name], transform=GradTransform(clip_value=clip_value))
    assert skipped == 7 + len(spoiled)
    for i in range(len(FEW)):
        expected = before if i in spoiled else good.columns()
        for column, other in zip([bad.params, bad.exp_avgs, bad.steps], [expected[k] for k in (0, 2, 3)], strict=True):
            assert_same_bits(column[i].contiguous(), other[i].contiguous(), FEW[i].name)


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_norm_keeps_what_a_bad_element_reaches(name, value):
    """The element, or the row or column that it is in; all elements so kept are counted, and the step goes on."""
    bad, good = make_bucket(FEW), make_bucket(FEW)
    i = PLACES["odd_matrix"]
    start = bad.params[i].clone()
    bad.grads[i][3, 5] = value
    reached = torch.zeros_like(start, dtype=torch.bool)
    reached[{"row": (3,), "col": (slice(None), 5), "sign": (3, 5)}[name]] = True
    skipped = torch.tensor(0)
    bad.run(RULES[name], transform=GradTransform(skipped=skipped))
    good.run(RULES[name])
    assert skipped == reached.sum()
    assert_same_bits(bad.params[i], torch.where(reached, start, good.params[i]))
    for a, b in zip(bad.steps, good.steps, strict=True):
        assert a == b


@every_rule
def test_without_the_policy_a_nan_spreads(name):
    bucket = make_bucket(FEW)
    bucket.grads[PLACES["odd_matrix"]][3, 5] = torch.nan
    bucket.run(RULES[name], transform=GradTransform(skip_nonfinite=False))
    assert bucket.params[PLACES["odd_matrix"]].isnan().any()


def test_signs_before_rows_keep_the_row_that_a_bad_element_reaches():
    """There is no sum over the matrix that would show it."""
    p, g, skipped = torch.ones(3, 4), torch.ones(3, 4), torch.tensor(0)
    g[1, 2] = float("nan")
    transform = GradTransform(skipped=skipped)
    sinkhorn_update_(
        [p], [g], [torch.zeros(())], lr=0.1, weight_decay=0.0, rule=NormRule(("sign", "row")), transform=transform
    )
    assert torch.equal(p, torch.tensor([[0.9], [1.0], [0.9]]).expand(3, 4))
    assert skipped == 4


@pytest.mark.parametrize("name", [name for name in WHOLE if "sign" not in RULES[name].norms])
def test_a_sum_of_squares_that_overflows_is_not_lost(name):
    """Its norm is Inf in fp32, so that the row would vanish, or the rest of its column."""
    bucket = make_bucket(FEW)
    start = bucket.params[PLACES["odd_matrix"]].clone()
    bucket.grads[PLACES["odd_matrix"]][3, 5] = 1e25
    skipped = torch.tensor(0)
    bucket.run(RULES[name], transform=GradTransform(skipped=skipped))
    assert skipped == 1
    assert_same_bits(bucket.params[PLACES["odd_matrix"]], start)


@every_rule
def test_found_inf_stops_everything(name):
    bucket, same = make_bucket(FEW), make_bucket(FEW)
    bucket.run(RULES[name], transform=GradTransform(found_inf=torch.tensor(1.0)))
    assert_same_buckets(bucket, same)
    bucket.run(RULES[name], transform=GradTransform(found_inf=torch.tensor(0.0)))
    same.run(RULES[name])
    assert_same_buckets(bucket, same)


@every_precision
@every_rule
def test_bits_do_not_depend_on_neighbours_or_the_run(name, precision):
    together, others = make_bucket(SHAPES, precision), make_bucket(SHAPES, precision)
    together.run(RULES[name])
    for i in range(len(SHAPES)):
        alone = others.only([i])
        alone.run(RULES[name], rounding=together.rounding([i]))
        assert_same_buckets(alone, together.only([i]))


def test_lr_may_be_a_tensor_and_zero_changes_nothing():
    for precision in (FP32, BF16_SR):
        bucket, same, tensor = (make_bucket(SHAPES, precision) for _ in range(3))
        bucket.run(RULES["sinkgd"], lr=torch.tensor(0.0))
        for a, b in zip(bucket.params, same.params, strict=True):
            assert_same_bits(a.contiguous(), b.contiguous())
        tensor.run(RULES["sinkgd"], lr=torch.tensor(0.5))
        same.run(RULES["sinkgd"], lr=0.5)
        assert_same_buckets(tensor, same)


def test_two_calls_are_one():
    """The scales and their application are the update, but for the order in which scale and lr are multiplied."""
    both, apart = make_bucket(SHAPES), make_bucket(SHAPES)
    both.run(NormRule())
    s, t = sinkhorn_scales(apart.grads, rule=NormRule())
    rank1_apply_(apart.params, apart.grads, s, t, apart.steps, rounding=apart.rounding(), **HYPER)
    assert_same_buckets(apart, both)


@pytest.mark.parametrize(
    ("norms", "line", "expected"),
    [
        (("row", "col") * 5, "row", ([(True, "cross")] * 5, False)),
        (("row", "col") * 5, "col", ([(False, "cross")] + [(True, "cross")] * 4, True)),
        (("row", "col") * 5 + ("row",), "row", ([(True, "cross")] * 5, True)),
        (("row",), "row", ([], True)),
        (("row",), "col", ([(False, "cross")], False)),
        (("sign",), "row", ([], False)),
        (("frobenius",), "row", ([(False, "total")], False)),
        (("col", "row", "frobenius"), "row", ([(False, "cross"), (True, "total")], False)),
    ],
)
def test_reads(norms, line, expected):
    """L pairs take L + 1 reads in either orientation, an odd half-step none of its own, one of lines a single one."""
    sweeps, last = sweeps_of(NormRule(norms), line)
    assert ([tuple(sweep) for sweep in sweeps], last) == expected


def test_steps_that_are_left():
    assert steps_of(("row", "row", "col", "sign", "frobenius", "col", "col")) == (True, ("col",), False)
    assert steps_of(("row", "frobenius", "row", "col", "frobenius")) == (False, ("row", "col"), True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (NormRule(()), r"norms is \(\).*'row', 'col', 'sign', 'frobenius'"),
        (NormRule(("row", "rows")), r"norms is \('row', 'rows'\).*allowed"),
        (NormRule(["row"]), r"norms is \['row'\].*a tuple"),
        (NormRule(eps=0.0), r"eps is 0.0; allowed: None or a finite number > 0"),
        (NormRule(("sign", "row"), eps=1e-8), r"eps is 1e-08 and norms is .*'row' and 'col' in turns"),
        (NormRule(row_threshold=-1.0), r"row_threshold is -1.0; allowed: a finite number >= 0"),
        (NormRule(("sign",), row_threshold=0.1), r"row_threshold is 0.1 and norms has 'sign'"),
        (NormRule(momentum=1.0), r"momentum is 1.0; allowed: a number >= 0 and < 1"),
        (NormRule(nesterov=True), r"nesterov is True and momentum is 0"),
        (NormRule(momentum_after=True), r"momentum_after is True and momentum is 0"),
        (NormRule(momentum=0.9), r"exp_avgs is None and rule.momentum is 0.9; allowed: both or neither"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense(rule, words):
    p, g, step = torch.ones(3, 4), torch.ones(3, 4), torch.tensor(0.0)
    with pytest.raises(ValueError, match=words):
        sinkhorn_update_([p], [g], [step], rule=rule, **HYPER)
    assert (p == 1).all()
    assert step == 0


def test_lists_that_do_not_fit():
    p, g, steps = [torch.ones(3, 4)], [torch.ones(3, 4)], [torch.tensor(0.0)]
    rule = NormRule(momentum=0.9)
    for change, words in (
        (dict(grads=[torch.ones(4, 3)]), r"grads\[0\] has shape \(4, 3\); allowed: \(3, 4\)"),
        (dict(steps=[]), r"steps has 0 entries; allowed: 1"),
        (dict(exp_avgs=[torch.ones(4, 3).mT]), r"exp_avgs\[0\] is not contiguous"),
        (dict(rounding=Rounding(uids=[1, 2])), r"rounding.uids has 2 entries"),
        (dict(backend="cuda"), r"backend is 'cuda'"),
    ):
        arguments = {**dict(params=p, grads=g, steps=steps, exp_avgs=[torch.ones(3, 4)], rule=rule, **HYPER), **change}
        with pytest.raises(ValueError, match=words):
            sinkhorn_update_(**arguments)
    with pytest.raises(ValueError, match="only row_offsets is given; allowed: both offsets or neither"):
        rank1_apply_(p, g, [torch.ones(3)], [torch.ones(4)], steps, row_offsets=[torch.ones(3)], **HYPER)
    with pytest.raises(ValueError, match=r"col_scales\[0\] has shape \(3,\); allowed: \(4,\)"):
        rank1_apply_(p, g, [torch.ones(3)], [torch.ones(3)], steps, **HYPER)
    with pytest.raises(TypeError, match=r"grads\[1\] is bfloat16"):
        sinkhorn_scales([g[0], g[0].bfloat16()], rule=NormRule())
    assert (p[0] == 1).all()


def test_nothing_to_do():
    for rule in (NormRule(), NormRule(momentum=0.9)):
        sinkhorn_update_([], [], [], rule=rule, exp_avgs=[] if rule.momentum else None, **HYPER)
    assert sinkhorn_scales([], rule=NormRule()) == ([], [])
