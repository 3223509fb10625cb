"""How the factored kernels' work is cut: every row and column in exactly one ticket, nothing twice in the scratch."""

import itertools
import math

import pytest
import torch

from lowmem_kernels.factored import schedule
from lowmem_kernels.factored.fields import FIELDS, PHASES, SCALARS, SEGMENT
from lowmem_kernels.factored.schedule import HALF_NARROW, HALF_WIDE, NARROW, WIDE, Geometry, geometry_of, schedules_of
from lowmem_kernels.testing import SHAPES, make_tensors

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
GEOMETRIES = [geometry_of(*make_tensors(case, torch.bfloat16, 0)) for case in SHAPES]
GEOMETRIES += [Geometry(shape, None) for shape in LARGE]


def schedules(geometries, rule="adafactor", aligned=True):
    return schedules_of(
        tuple(geometries), (aligned,) * len(geometries), tuple(range(5, 5 + len(geometries))), RULES[rule]
    )


def rows_of(found):
    """(geometry's place, row as a dict) of a schedule's parameters."""
    for k, i in enumerate(found.members):
        start = found.rows_start + k * len(FIELDS)
        yield i, dict(zip(FIELDS, found.values[start : start + len(FIELDS)], strict=True))


def sizes_of(row, residual):
    """Elements of the scratch that the kernels use of a parameter, by fields.py."""
    matrices, n, m = row["matrices"], row["n"], row["m"]
    groups = matrices * row["groups"]
    factored = not row["full"]
    return {
        "new_row": factored * matrices * n,
        "new_col": factored * matrices * m,
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
def test_segments_and_launches(rule):
    """Each launch's segments are a run of tickets from its first to its last, of each parameter as many as it has."""
    for found in schedules(GEOMETRIES, rule):
        assert [launch.phase for launch in found.launches] == [p for p in RULES[rule] if p in PHASES]
        tickets = {i: row for i, row in rows_of(found)}
        ticket = segment = 0
        for launch in found.launches:
            assert (launch.ticket, launch.segment) == (ticket, segment)
            seen = []
            for s in range(launch.segment, launch.segment + launch.segments):
                first, k, phase = found.values[s * SEGMENT : (s + 1) * SEGMENT]
                row = tickets[found.members[k]]
                assert (first, phase) == (ticket, PHASES.index(launch.phase))
                ticket += row["col_tickets" if launch.phase.endswith("columns") else "tickets"]
                seen.append(k)
            segment += launch.segments
            assert ticket == launch.ticket + launch.tickets
            only_matrices = launch.phase in ("floor", "residual_columns")
            expected = [k for k, i in enumerate(found.members) if not (only_matrices and tickets[i]["full"])]
            assert seen == expected
        assert found.rows_start == segment * SEGMENT


@pytest.mark.parametrize("rule", RULES)
def test_scratch_is_shared_by_nobody(rule):
    for found in schedules(GEOMETRIES, rule):
        regions = [
            (row[name], row[name] + size)
            for _, row in rows_of(found)
            for name, size in sizes_of(row, rule == "came").items()
            if size
        ]
        regions.sort()
        for (_, end), (start, _) in itertools.pairwise(regions):
            assert end <= start
            assert start % 4 == 0  # a multiple of 16 bytes
        assert regions[-1][1] <= found.scratch < regions[-1][1] + 4 * len(FIELDS)


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


def test_parts_of_a_long_list(monkeypatch):
    """As many parameters as fit into the scratch, in order; one that does not fit at all is alone."""
    geometries = [Geometry((n, 256), None) for n in (64, 64, 64, 4096, 64, 64)]
    (whole,) = schedules(geometries)
    small = schedules(geometries[:1])[0].scratch
    monkeypatch.setattr(schedule, "SCRATCH_BYTES", 4 * 2 * small)
    parts = schedules(geometries)
    assert [part.members for part in parts] == [(0, 1), (2,), (3,), (4, 5)]
    assert all(part.scratch <= 2 * small or len(part.members) == 1 for part in parts)
    monkeypatch.setattr(schedule, "SCRATCH_BYTES", 0)
    assert [part.members for part in schedules(geometries)] == [(i,) for i in range(6)]
    assert whole.members == tuple(range(6))


@pytest.mark.parametrize("rule", RULES)
def test_launches_do_not_grow_with_parameters(rule):
    counts = [
        [len(found.launches) for found in schedules([Geometry((64, 256), None)] * count, rule)]
        for count in (6, 60, 291)
    ]
    assert counts == [[len(RULES[rule])]] * 3


def test_what_kernels_read_as_32_bits_fits():
    wide = {"key", "numel", "dims", *sizes_of(dict.fromkeys(FIELDS, 1), residual=True)}
    for geometry in GEOMETRIES:
        ((_, row),) = rows_of(schedules([geometry], "came")[0])
        assert all(0 <= value < 2**31 for name, value in row.items() if name not in wide and "stride" not in name)
