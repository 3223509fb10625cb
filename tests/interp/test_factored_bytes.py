"""The bytes that the factored kernels request, by tensor: those of the formulas, and the column sums in the scratch."""

from dataclasses import replace

import pytest
import torch

from factored_buckets import CAME, NAMES, RULES, make_bucket
from lowmem_kernels.factored import schedule
from lowmem_kernels.factored.fields import SLAB
from lowmem_kernels.testing import Case, Precision, bytes_moved
from lowmem_kernels.testing.bytecount import count_bytes

BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
BF16_FP32 = Precision(torch.bfloat16, torch.bfloat16, torch.float32)
FP32 = Precision(torch.float32, torch.float32, torch.float32)
#: Few rows of large matrices, and several groups.
SHAPES = [(8, 11008), (16, 4096), (40, 4096), (130, 512)]
UNSCALED = replace(RULES["adalomo"]["rule"], scale_parameter=False)


def requested(monkeypatch, case, precision, rule=None, grad=None, carried=False):
    """One step's traffic of a tensor that is not new, by name; the scratch and the tables have names of their own."""
    bucket = make_bucket([case], precision, verb="factored" if rule else "confidence")
    if grad is not None:
        bucket.grads[0].fill_(grad)
        for moment in (*bucket.rows, *bucket.cols):
            moment.fill_(grad**2)
    scratch = torch.full((1 << 20,), torch.nan)
    monkeypatch.setattr(torch, "empty", lambda size, **_: scratch[:size])
    named = {name: [t for t in column if t is not None] for name, column in zip(NAMES, bucket.columns(), strict=True)}
    options = dict(CAME) if rule is None else dict(lr=1e-3, weight_decay=0.1, rule=rule)
    if carried:
        options["param_sums"] = named["param_sums"] = [bucket.params[0].float().square().sum()]
    with count_bytes({**named, "scratch": scratch}) as traffic:
        bucket.run("factored" if rule else "confidence", backend="triton", **options)
    return traffic


def total(traffic):
    """Bytes (read, written) of what has the parameter's shape."""
    return tuple(
        sum(kind[name] for name in ("params", "grads", "exp_avgs")) for kind in (traffic.read, traffic.written)
    )


def cut(shape, tile_rows=16):
    """(n, m, blocks of rows, groups of blocks, slabs of columns) of a wide aligned matrix."""
    blocks = -(-shape[0] // tile_rows)
    return *shape, blocks, min(blocks, schedule.MAX_GROUPS), -(-shape[1] // SLAB)


def assert_scratch(traffic, shape, came):
    """Row and column factors and the groups' column sums, to the byte; a few numbers for each program on top."""
    n, m, blocks, groups, slabs = cut(shape)
    # the columns' sums of two kinds, added up in memory over the blocks of a group
    sums_written, sums_read = 2 * m * blocks, 2 * m * (blocks - groups) + 2 * m * groups
    # R, C and 1/sqrt(C)
    written = n + 2 * m + sums_written
    # rows once, columns' factors for each block of rows, and C for the state
    read = sums_read + n + m * blocks + m
    if came:  # sums of one kind more; Rs, Cs and its factor; and in the last look those, R and C
        written += n + 2 * m + m * blocks
        read += m * blocks + n + m * blocks + n + m
    few = 4 * (groups + slabs) * (8 + groups) * (2 if came else 1)
    assert 4 * written <= traffic.written["scratch"] <= 4 * written + few
    assert 4 * read <= traffic.read["scratch"] <= 4 * read + few
    # tickets, segments, fields and addresses, int64 each
    assert traffic.read["other"] <= 8 * 100 * (groups + slabs) * blocks * (m // 256 + 1)


def assert_whole_lines(traffic, name, nbytes):
    """Each line of 128 bytes is one that is needed: what is read again can come from a cache."""
    assert nbytes <= 128 * len(traffic.lines_read[name]) <= nbytes + 2 * 128


@pytest.mark.parametrize(
    ("shape", "precision", "momentum"),
    [
        *((shape, BF16, False) for shape in SHAPES),
        *((shape, BF16, True) for shape in SHAPES[1:]),
        *((SHAPES[3], precision, momentum) for precision in (FP32, BF16_FP32) for momentum in (False, True)),
    ],
    ids=str,
)
def test_adafactor(shape, precision, momentum, monkeypatch):
    rule = replace(UNSCALED, beta1=0.9 if momentum else None)
    traffic = requested(monkeypatch, Case("case", shape), precision, rule)
    e, s, numel = precision.param.itemsize, precision.state.itemsize * momentum, shape[0] * shape[1]
    assert total(traffic) == bytes_moved("factored", numel, e, s)
    assert traffic.read["grads"] == 3 * e * numel
    assert traffic.read["params"] == traffic.written["params"] == e * numel
    assert traffic.read["exp_avgs"] == traffic.written["exp_avgs"] == s * numel
    assert traffic.written["rows"] == traffic.read["rows"] == 4 * shape[0]
    assert traffic.written["cols"] == traffic.read["cols"] == 4 * shape[1]
    assert_scratch(traffic, shape, came=False)
    assert_whole_lines(traffic, "grads", e * numel)
    assert_whole_lines(traffic, "params", e * numel)
    assert not sum(traffic.atomic[name] for name in (*NAMES, "scratch"))


@pytest.mark.parametrize(
    ("shape", "precision"), [*((shape, BF16) for shape in SHAPES), (SHAPES[3], FP32), (SHAPES[3], BF16_FP32)], ids=str
)
def test_came(shape, precision, monkeypatch):
    traffic = requested(monkeypatch, Case("case", shape), precision)
    e, s, numel = precision.param.itemsize, precision.state.itemsize, shape[0] * shape[1]
    assert total(traffic) == bytes_moved("confidence", numel, e, s)
    assert traffic.read["grads"] == 3 * e * numel
    assert traffic.read["params"] == traffic.written["params"] == e * numel
    assert traffic.read["exp_avgs"] == 2 * traffic.written["exp_avgs"] == 2 * s * numel
    for factor, size in (("rows", shape[0]), ("cols", shape[1]), ("res_rows", shape[0]), ("res_cols", shape[1])):
        assert traffic.written[factor] == traffic.read[factor] == 4 * size
    assert_scratch(traffic, shape, came=True)
    assert_whole_lines(traffic, "grads", e * numel)
    assert_whole_lines(traffic, "exp_avgs", s * numel)


def test_a_carried_sum_saves_reading_p(monkeypatch):
    case, numel = Case("case", (130, 512)), 130 * 512
    for carried, formula in ((False, "factored_scaled"), (True, "factored")):
        traffic = requested(monkeypatch, case, BF16, RULES["adalomo"]["rule"], carried=carried)
        assert total(traffic) == bytes_moved(formula, numel, 2)
        assert traffic.read["params"] == (2 if carried else 4) * numel
    assert traffic.written["param_sums"] == 4


@pytest.mark.parametrize(("grad", "formula"), [(1e-2, "factored"), (1e-6, "factored_floor")])
def test_the_floor_is_looked_at_only_where_it_is_felt(grad, formula, monkeypatch):
    rule = replace(RULES["torch"]["rule"], scale_parameter=False)
    traffic = requested(monkeypatch, Case("case", (130, 512)), FP32, rule, grad=grad)
    assert total(traffic) == bytes_moved(formula, 130 * 512, 4)


@pytest.mark.parametrize("verb", ["factored", "factored with momentum", "confidence"])
@pytest.mark.parametrize("precision", [BF16, BF16_FP32, FP32], ids=str)
def test_a_vector_keeps_v_in_full(verb, precision, monkeypatch):
    """V is computed in both looks rather than stored between them."""
    rule = {"factored": UNSCALED, "factored with momentum": replace(UNSCALED, beta1=0.9), "confidence": None}[verb]
    traffic = requested(monkeypatch, Case("case", (9000,)), precision, rule)
    e, s = precision.param.itemsize, 0 if verb == "factored" else precision.state.itemsize
    assert traffic.read["grads"] == 2 * e * 9000
    assert traffic.read["rows"] == 2 * traffic.written["rows"] == 2 * 4 * 9000
    assert traffic.read["params"] == traffic.written["params"] == e * 9000
    read, written = total(traffic)
    formula = "confidence_vector" if rule is None else "factored_vector"
    moved = read + traffic.read["rows"], written + traffic.written["rows"]
    assert moved == bytes_moved(formula, 9000, e, s)
