"""How the multi-normalization kernel's work is cut: every line and place in exactly one ticket, no scratch twice."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from lowmem_kernels.device import HOPPER
from lowmem_kernels.lines import matrix_shape
from lowmem_kernels.multinorm import NormRule, schedule
from lowmem_kernels.multinorm.fields import FIELDS, SLAB
from lowmem_kernels.multinorm.launch import MultinormPlan, plan_multinorm
from lowmem_kernels.multinorm.rule import sweeps_of
from lowmem_kernels.multinorm.schedule import route_of, schedules_of
from lowmem_kernels.schedules import Geometry, geometries_of
from lowmem_kernels.table import Layout, strides_of
from lowmem_kernels.testing import SHAPES, make_tensors
from lowmem_kernels.testing.models import model_shapes
from lowmem_kernels.tickets import SEGMENT, Order, plan_order
from multinorm_buckets import RULES

LARGE = [
    (32000, 4096), (4096, 11008), (11008, 4096), (50257, 768), (8, 11008), (4096, 1), (64, 2048, 1408), (200, 24, 136),
    (512, 512, 3, 3), (64, 3, 7, 7), (8192, 28672), (512, 28672), (300, 130), (4097,), (3, 0), (0, 5, 3), (2, 0, 5),
]  # fmt: skip
_PARAMS, _GRADS = zip(*(make_tensors(case, torch.bfloat16, 0) for case in SHAPES), strict=True)
GEOMETRIES = [*geometries_of(_PARAMS, strides_of(_PARAMS, _GRADS)), *(Geometry(shape, None) for shape in LARGE)]
TRANSPOSED = Geometry((4096, 11008), ((1, 4096), (1, 4096)))
SINKGD, ROW, COL = NormRule(), NormRule(("row",)), NormRule(("col",))


def rows_of(found):
    for k, i in enumerate(found.members):
        start = found.rows_start + k * len(FIELDS)
        yield i, dict(zip(FIELDS, found.values[start : start + len(FIELDS)].tolist(), strict=True))


@pytest.mark.parametrize("order", [plan_order(HOPPER), Order(0, 3, True, False)], ids=["hopper", "alone"])
@pytest.mark.parametrize("name", RULES)
def test_every_line_and_place_has_one_ticket(name, order):
    rule = RULES[name]
    seen = []
    for found in schedules_of(GEOMETRIES, [True] * len(GEOMETRIES), range(len(GEOMETRIES)), rule, True, 2, order):
        segments = found.values[found.segments_start : found.rows_start].reshape(-1, len(SEGMENT))
        tickets = Counter((found.values[: found.segments_start] >> 32).tolist())
        counts = {}
        for s, segment in enumerate(segments.tolist()):
            fields = dict(zip(SEGMENT, segment, strict=True))
            assert tickets[s] == fields["count"]
            counts[fields["owner"], fields["phase"]] = fields["count"]
        sweeps = () if found.route.whole else sweeps_of(rule, "row" if found.route.rows else "col")[0]
        scratch = []
        for k, (i, row) in enumerate(rows_of(found)):
            seen.append(i)
            matrices, n, m = matrix_shape(GEOMETRIES[i].shape, rule.conv)
            lines, length = (n, m) if found.route.rows else (m, n)
            if matrices * n * m:
                assert (row["matrices"], row["lines"], row["length"]) == (matrices, lines, length)
            assert row["group_lines"] % found.route.tile.rows == 0
            assert row["groups"] * row["group_lines"] >= row["lines"] > (row["groups"] - 1) * row["group_lines"] or (
                row["lines"] == 0 and row["groups"] == 1
            )
            shares = -(-row["matrices"] // row["batch"])
            assert row["batch"] == 1 or row["groups"] == 1
            assert row["slab_tickets"] * row["slab_width"] >= row["length"]
            assert row["slab_width"] == SLAB or row["slab_tickets"] == 1
            expected = {}
            for k_sweep, sweep in enumerate(sweeps):
                expected[k, 2 * k_sweep] = shares * row["groups"]
                expected[k, 2 * k_sweep + 1] = shares * (row["slab_tickets"] if sweep.sums == "cross" else 1)
            expected[k, 2 * len(sweeps)] = shares * row["groups"]
            assert {key: count for key, count in counts.items() if key[0] == k} == expected
            sums = {sweep.sums for sweep in sweeps}
            sizes = {
                "line_scale": row["matrices"] * row["lines"], "cross_scale": row["matrices"] * row["length"],
                "group_sum": row["matrices"] * row["groups"] * bool(sums & {"norms", "total"}),
                "line_norm": row["matrices"] * row["lines"] * ("norms" in sums),
                "threshold": row["matrices"] * ("norms" in sums), "factor": row["matrices"] * ("total" in sums),
                "probe": max([0, *(expected[k, 2 * j + 1] for j in range(len(sweeps)))]), "ok": 1,
            }  # fmt: skip
            scratch += [(row[what], row[what] + size) for what, size in sizes.items() if size]
        scratch.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(scratch))
        assert scratch[-1][1] <= found.scratch
    assert sorted(seen) == list(range(len(GEOMETRIES)))


def test_routes():
    """Lines are what lies in one piece, unless others are short and save a read, or these are too long to be held."""

    def facts(geometry, rule, aligned=True):
        route = route_of(geometry, aligned, rule)
        return route.rows, route.contiguous, route.resident, tuple(route.tile)

    square = Geometry((4096, 4096), None)
    assert facts(square, SINKGD) == facts(square, COL) == (True, True, True, (2, 4096))
    assert facts(Geometry((4096, 11008), None), SINKGD) == (True, True, True, (1, 16384))
    assert facts(Geometry((8192, 28672), None), SINKGD) == (True, True, False, (4, 1024))
    assert facts(Geometry((512, 28672), None), SINKGD) == (False, False, True, (16, 512))
    assert facts(Geometry((512, 4096), None), SINKGD) == (True, True, True, (2, 4096))
    assert facts(Geometry((512, 4096), None), COL) == (False, False, True, (16, 512))
    assert facts(TRANSPOSED, SINKGD) == (False, True, True, (2, 4096))
    assert facts(TRANSPOSED, NormRule(row_threshold=0.1))[:2] == (True, False)
    assert facts(Geometry((4096, 1001), None), SINKGD) == (True, True, True, (2, 1024))
    assert route_of(square, False, SINKGD).layout == Layout(False, False)
    assert route_of(Geometry((64, 64), ((64, 1), (1, 64))), True, SINKGD).layout == Layout(False, True)


def test_a_single_matrix_that_fits_is_held_as_a_whole():
    """Of 8192 elements with both sizes rounded up to powers of two, 2048 where elements go one by one."""
    whole = {
        shape: route_of(Geometry(shape, None), True, rule).whole
        for shape, rule in [((64, 128), SINKGD), ((65, 128), SINKGD), ((2, 64, 64), SINKGD), ((37, 29), SINKGD),
                            ((37, 65), SINKGD), ((8192,), SINKGD), ((8200,), SINKGD), ((64, 64), ROW)]
    }  # fmt: skip
    assert list(whole.values()) == [True, False, False, True, False, True, False, False]
    assert route_of(Geometry((64, 128), None), True, SINKGD).tile == (64, 128)
    assert not route_of(Geometry((64, 128), None), True, SINKGD, writes=False).whole
    assert route_of(Geometry((64, 64), ((1, 64), (1, 64))), True, SINKGD)[1:3] == (False, True)


def test_tiles_have_as_many_elements_as_threads_have_room_for():
    for geometry in (*GEOMETRIES, TRANSPOSED):
        for rule in (SINKGD, ROW, COL):
            route = route_of(geometry, True, rule)
            plan = plan_multinorm(route, 32)
            for tile in (route.tile, route.apply_tile):
                per_thread = math.prod(tile) // (32 * plan.num_warps)
                assert per_thread <= (32 if route.layout.aligned else 4)
                assert per_thread >= 4 or route.whole
    assert plan_multinorm(route_of(Geometry((4096, 4096), None), True, SINKGD), 32) == MultinormPlan(8, 128)
    assert plan_multinorm(route_of(Geometry((4096, 11008), None), True, SINKGD), 32) == MultinormPlan(16, 128)
    assert plan_multinorm(route_of(Geometry((4096, 4096), None), True, SINKGD), 64) == MultinormPlan(8, None)


def test_a_large_model_needs_little_scratch_and_fills_a_gpu():
    """Sums of bundles take turns; a matrix of Llama-7B has 256 tickets in each read."""
    shapes = [shape for shape in model_shapes("llama-7b").values() if len(shape) == 2]
    geometries = [Geometry(shape, None) for shape in shapes]
    found = schedules_of(geometries, [True] * len(shapes), range(len(shapes)), SINKGD, True, 2, plan_order(HOPPER))
    assert len(found) == 2  # rows of 4096 and of 11008
    elements = sum(map(math.prod, shapes))
    assert sum(4 * each.scratch for each in found) < 0.01 * 2 * elements
    for each in found:
        for _, row in rows_of(each):
            assert row["groups"] >= 250


def test_limits_are_what_the_comments_say():
    assert schedule.RESIDENT_ELEMENTS // 512 == schedule.ACROSS
    assert schedule.LONGEST == 16 * 32 * 32
