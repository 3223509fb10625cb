"""How the factored kernels' work is cut: every row and column in exactly one ticket, nothing twice in the scratch."""

import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch

from lowmem_kernels.device import HOPPER
from lowmem_kernels.factored import schedule
from lowmem_kernels.factored.fields import FIELDS, PHASES, SCALARS
from lowmem_kernels.factored.schedule import HALF_NARROW, HALF_WIDE, NARROW, WIDE, schedules_of
from lowmem_kernels.schedules import Geometry, geometries_of
from lowmem_kernels.table import strides_of
from lowmem_kernels.testing import SHAPES, make_tensors
from lowmem_kernels.tickets import SEGMENT, SLOTS, Order, plan_order

ADAFACTOR = ("look", "columns", "apply")
TORCH = ("look", "columns", "floor", "apply")
CAME = ("look", "columns", "residual", "residual_columns", "apply")
RULES = {"adafactor": ADAFACTOR, "torch": TORCH, "came": CAME}
#: A language model's, convolutions, experts, and sizes at which something is cut.
LARGE = [
    (32000, 4096), (4096, 11008), (11008, 4096), (65536, 65536), (50257, 768), (8, 11008), (1, 4096), (4096, 1),
    (64, 2048, 1408), (200, 24, 136), (2048, 16, 264), (512, 512, 3, 3), (64, 3, 7, 7), (2049, 8), (2048, 64),
    (2048, 65), (128, 256), (129, 256), (300, 130), (4096,), (4097,), (2**31 + 9,), (128, 2048, 8), (3, 0), (0, 5, 3),
    (2, 0, 5),
]  # fmt: skip
_PARAMS, _GRADS = zip(*(make_tensors(case, torch.bfloat16, 0) for case in SHAPES), strict=True)
GEOMETRIES = [*geometries_of(_PARAMS, strides_of(_PARAMS, _GRADS))]
GEOMETRIES += [Geometry(shape, None) for shape in LARGE]


#: Every parameter a bundle; what an H100 gets.
ORDERS = {"alone": Order(0, 3, True, False), "hopper": plan_order(HOPPER)}


def schedules(geometries, rule="adafactor", aligned=True, order="hopper"):
    keys = tuple(range(5, 5 + len(geometries)))
    return schedules_of(tuple(geometries), (aligned,) * len(geometries), keys, RULES[rule], 2, ORDERS[order])


def rows_of(found):
    """(geometry's place, row as a dict) of a schedule's parameters."""
    for k, i in enumerate(found.members):
        start = found.rows_start + k * len(FIELDS)
        yield i, dict(zip(FIELDS, found.values[start : start + len(FIELDS)].tolist(), strict=True))


def segments_of(found):
    """The segments of a schedule, as dicts."""
    segments = found.values[found.segments_start : found.rows_start].reshape(-1, len(SEGMENT))
    return [dict(zip(SEGMENT, row, strict=True)) for row in segments.tolist()]


def sizes_of(row, residual):
    """Elements of the scratch that the kernels use of a parameter, by fields.py."""
    matrices, n, m = row["matrices"], row["n"], row["m"]
    groups = matrices * row["groups"]
    factored = not row["full"]
    return {
        "new_row": factored * matrices * n,
        "new_col": factored * matrices * m,
        "col_scale": factored * matrices * m,
        "row_mean": factored * matrices,
        "partial": factored * groups * 2 * m,
        "row_sum": groups,
        "row_min": factored * groups,
        "param_sum": row["tickets"],
        "update_sum": max(row["tickets"], row["col_tickets"]),
        "floored": factored * row["col_tickets"],
        "scalars": len(SCALARS),
        "res_row": factored * residual * matrices * n,
        "res_col": factored * residual * matrices * m,
        "res_scale": factored * residual * matrices * m,
        "res_mean": factored * residual * matrices,
    }


def covered(pieces, total):
    """Whether half-open ranges cover 0 .. total exactly once."""
    end = 0
    for first, last in sorted(piece for piece in pieces if piece[0] < piece[1]):
        if first != end:
            return False
        end = last
    return end == total


def row_pieces(row):
    """For each ticket of the look and apply phases, its matrices and rows, as ranges of matrix * n + row."""
    for ticket in range(row["tickets"]):
        first = ticket // row["groups"] * row["batch"]
        start = ticket % row["groups"] * row["group_rows"]
        for e in range(first, min(first + row["batch"], row["matrices"])):
            yield e * row["n"] + start, e * row["n"] + min(start + row["group_rows"], row["n"])


def column_pieces(row):
    """For each ticket of the column phases, its matrices and columns, as ranges of matrix * m + column."""
    for ticket in range(row["col_tickets"]):
        first = ticket // row["slab_tickets"] * row["batch"]
        start = ticket % row["slab_tickets"] * row["slab_width"]
        for e in range(first, min(first + row["batch"], row["matrices"])):
            yield e * row["m"] + start, e * row["m"] + min(start + row["slab_width"], row["m"])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "x".join(map(str, geometry.shape)) or "scalar")
def test_every_row_and_column_is_in_one_ticket(geometry, aligned):
    (found,) = schedules([geometry], aligned=aligned)
    ((_, row),) = rows_of(found)
    shape = geometry.shape
    assert row["numel"] == math.prod(shape)
    # all rows but the last have m elements
    elements = row["matrices"] * row["n"] * row["m"] - (row["m"] - row["last"] if row["n"] else 0)
    assert elements == row["numel"]
    if len(shape) >= 2 and row["numel"]:
        assert (row["n"], row["m"], row["full"]) == (*shape[-2:], 0)
        assert covered(column_pieces(row), row["matrices"] * row["m"])
    assert covered(row_pieces(row), row["matrices"] * row["n"])
    # a group of no rows would leave its column sums unwritten
    assert row["groups"] == max(1, -(-row["n"] // row["group_rows"]))
    assert row["group_rows"] % found.tile.rows == 0
    assert row["matrices"] * row["groups"] <= max(row["matrices"], schedule.MAX_GROUPS)
    assert row["batch"] == 1 or row["groups"] == 1


@pytest.mark.parametrize("rule", RULES)
def test_every_parameter_has_its_tickets_in_each_phase(rule):
    for found in schedules(GEOMETRIES, rule):
        assert [len(tickets) for tickets in found.launches] == [found.segments_start]
        tickets = [row for _, row in rows_of(found)]
        segments = segments_of(found)
        seen = Counter((found.values[: found.segments_start] >> 32).tolist())
        assert {(s["owner"], s["phase"]): seen[i] for i, s in enumerate(segments)} == {
            (k, PHASES.index(phase)): row["col_tickets" if phase.endswith("columns") else "tickets"]
            for k, row in enumerate(tickets)
            for phase in RULES[rule]
            if not (phase in ("floor", "residual_columns") and row["full"])
        }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_scratch_is_shared_in_turns_only(rule, order):
    """Column sums lie in one of two slots, beside those of the same bundle; everything else has a place of its own."""
    for found in schedules(GEOMETRIES, rule, order=order):
        rows = [row for _, row in rows_of(found)]
        own = [
            (row[name], row[name] + size)
            for row in rows
            for name, size in sizes_of(row, rule == "came").items()
            if size and name != "partial"
        ]
        assert max(overlap(own)) <= 0
        assert max(end for _, end in own) <= found.scratch < max(end for _, end in own) + 4 * len(FIELDS)
        bundles = defaultdict(list)
        for segment in segments_of(found):
            row = rows[segment["owner"]]
            if segment["phase"] == 0 and (size := sizes_of(row, rule == "came")["partial"]):
                bundles[segment["wait"]].append((row["partial"], row["partial"] + size))
                assert row["partial"] % 4 == 0  # a multiple of 16 bytes
        # the first bundles of the two slots wait for nothing, and lie side by side
        for regions in bundles.values():
            assert max(overlap(regions)) <= 0
            assert max(end for _, end in regions) <= min(start for start, _ in own)


def overlap(regions):
    """By how much each region reaches into the next."""
    return [end - start for (_, end), (start, _) in itertools.pairwise(sorted(regions))] or [0]


def test_how_a_parameter_is_cut_depends_on_itself_only():
    """All but places in the scratch and the table: in a list, in the reverse of it, and alone."""

    def cut(row):
        places = {"key", "dims", *sizes_of(row, residual=True)}
        return {name: value for name, value in row.items() if name not in places}

    alone = []
    for geometry in GEOMETRIES:
        ((_, row),) = rows_of(schedules([geometry])[0])
        alone.append(cut(row))
    for geometries, expected in ((GEOMETRIES, alone), (GEOMETRIES[::-1], alone[::-1])):
        found = dict(item for part in schedules(geometries) for item in rows_of(part))
        assert [cut(found[i]) for i in range(len(geometries))] == expected
        assert [found[i]["key"] for i in range(len(geometries))] == list(range(5, 5 + len(geometries)))


def test_layouts_and_tiles():
    """Four tiles, three layouts; rows that are no multiple of 8 elements have no 16-byte accesses."""
    kinds = {}
    for aligned in (True, False):
        for found in schedules(GEOMETRIES, aligned=aligned):
            assert found.tile in ((WIDE, NARROW) if found.layout.aligned else (HALF_WIDE, HALF_NARROW))
            for i in found.members:
                shape, strides = GEOMETRIES[i]
                assert found.layout.strided == (strides is not None)
                whole = not shape or shape[-1] % 8 == 0
                assert found.layout.aligned == (aligned and strides is None and whole and shape != ())
                narrow = len(shape) >= 2 and shape[-1] <= 64
                assert found.tile.cols == (32 if narrow else 256)
                kinds.setdefault(found.tile, set()).add(found.layout)
    assert {tile: len(layouts) for tile, layouts in kinds.items()} == {WIDE: 1, NARROW: 1, HALF_WIDE: 2, HALF_NARROW: 2}


def test_bundles_of_a_long_list(monkeypatch):
    """The scratch has two slots for the largest bundle, however long the list is; one parameter may be too large.

    A single bundle takes no turns, and has one.
    """
    geometries = [Geometry((n, 256), None) for n in (64, 64, 64, 4096, 64, 64)]
    ((_, small), *_, (_, large), _, _) = rows_of(schedules(geometries)[0])
    sizes = {row["groups"]: 2 * 256 * row["groups"] for row in (small, large)}
    own = schedules(geometries)[0].scratch - (sum(sizes.values()) + 4 * sizes[small["groups"]])
    monkeypatch.setattr(schedule, "SCRATCH_BYTES", 4 * 2 * sizes[small["groups"]])
    (found,) = schedules(geometries)
    assert found.scratch == own + SLOTS * sizes[large["groups"]]
    (longer,) = schedules(geometries * 10)
    assert longer.scratch == 10 * own + SLOTS * sizes[large["groups"]]
    # look tickets of bundle b wait for bundle b - 2: (0, 1), (2,), (3,), (4, 5)
    waits = [segment["wait"] for segment in segments_of(found) if segment["phase"] == 0]
    assert waits == [0, 0, 0, 2, 3, 3]


def test_what_kernels_read_as_32_bits_fits():
    wide = {"key", "numel", "dims", *sizes_of(dict.fromkeys(FIELDS, 1), residual=True)}
    for geometry in GEOMETRIES:
        ((_, row),) = rows_of(schedules([geometry], "came")[0])
        assert all(0 <= value < 2**31 for name, value in row.items() if name not in wide and "stride" not in name)
