"""Plans of the factored kernels: what is chosen for whom; neither tiny nor huge parameters leave a GPU idle."""

from itertools import pairwise

from lowmem_kernels.device import HOPPER
from lowmem_kernels.factored.fields import FIELDS, PHASES
from lowmem_kernels.factored.launch import FactoredPlan, plan_factored
from lowmem_kernels.factored.schedule import (
    HALF_NARROW,
    HALF_WIDE,
    NARROW,
    WIDE,
    FactoredSchedule,
    layout_of,
    schedules_of,
    tile_of,
)
from lowmem_kernels.schedules import Geometry
from lowmem_kernels.table import Layout
from lowmem_kernels.testing.models import model_shapes
from lowmem_kernels.tickets import SEGMENT, plan_order

#: Programs that an H100 has room for, at two on each processor.
SLOTS = 2 * HOPPER.sm_count
ADAFACTOR = ("look", "columns", "apply")


def schedule_of(*shapes: tuple[int, ...]) -> FactoredSchedule:
    """The schedule of bfloat16 gradients on an H100, if there is one for all of them."""
    geometries = [Geometry(shape, None) for shape in shapes]
    count = len(shapes)
    (found,) = schedules_of(geometries, [True] * count, range(count), ADAFACTOR, 2, plan_order(HOPPER))
    return found


def phases_of(found: FactoredSchedule) -> list[int]:
    """The phase of every ticket, in their order."""
    segments = found.values[found.segments_start : found.rows_start].reshape(-1, len(SEGMENT))
    return [int(segments[word >> 32][SEGMENT.index("phase")]) for word in found.values[: found.segments_start].tolist()]


def rows_of(found: FactoredSchedule) -> list[dict[str, int]]:
    rows = found.values[found.rows_start :][: len(found.members) * len(FIELDS)].reshape(-1, len(FIELDS))
    return [dict(zip(FIELDS, row, strict=True)) for row in rows.tolist()]


def test_warps_and_registers():
    """16 elements for each thread, or 4 with an address for each."""
    aligned, misaligned, strided = Layout(True, False), Layout(False, False), Layout(False, True)
    for tile in (WIDE, NARROW):
        assert plan_factored(tile, aligned, 32) == FactoredPlan(tile, 8, 128)
        assert plan_factored(tile, aligned, 64) == FactoredPlan(tile, 8, None)
        assert tile.rows * tile.cols == 16 * 8 * 32
    for tile in (HALF_WIDE, HALF_NARROW):
        for layout in (misaligned, strided):
            assert plan_factored(tile, layout, 32) == FactoredPlan(tile, 16, None)
        assert tile.rows * tile.cols == 4 * 16 * 32


def test_ragged_and_misaligned_tensors_keep_vectors_where_they_can():
    strides = ((1, 72), (1, 72))
    for shape, aligned, geometry_strides, expected in [
        ((64, 4096), True, None, WIDE),
        ((65, 4096), True, None, WIDE),  # rows are whole vectors, however many there are
        ((4096, 64), True, None, NARROW),
        ((4099,), True, None, HALF_WIDE),
        ((64, 4097), True, None, HALF_WIDE),
        ((64, 4096), False, None, HALF_WIDE),
        ((72, 72), True, strides, HALF_WIDE),
        ((72, 33), True, None, HALF_NARROW),
    ]:
        geometry = Geometry(shape, geometry_strides)
        layout = layout_of(geometry, aligned)
        assert layout.aligned == (expected in (WIDE, NARROW))
        assert tile_of(geometry, layout) == expected


def test_a_matrix_of_its_own_fills_the_gpu():
    """4096 rows are about as many tickets as there is room for; a large vocabulary has two for each place."""
    for shape, tickets in (((4096, 4096), 256), ((11008, 4096), 344), ((128256, 4096), 501), ((4096, 128256), 256)):
        (row,) = rows_of(schedule_of(shape))
        assert row["tickets"] == tickets >= 0.95 * SLOTS
        # and what the readers of a slab of columns read is at most 128 KB
        assert row["groups"] * 32 * 8 <= 128 * 1024


def test_the_scratch_of_a_large_model_is_small():
    """Llama-7B has many times as many bytes of column sums as the two slots: scratch is under 1 % of its parameters."""
    found = schedule_of(*model_shapes("llama-7b").values())
    sums = sum(2 * 4 * row["groups"] * row["m"] * row["matrices"] for row in rows_of(found) if not row["full"])
    parameters = sum(row["numel"] for row in rows_of(found))
    assert parameters == 6_738_415_616
    assert 4 * found.scratch < 0.01 * 2 * parameters
    assert sums > 30 * 4 * found.scratch


def test_tiny_parameters_share_bundles():
    """A thousand vectors: phases of many at a time, not one waiting for the other."""
    phases = phases_of(schedule_of(*[(768,)] * 1000))
    changes = sum(a != b for a, b in pairwise(phases))
    assert len(phases) == 3000
    assert changes == 2


def test_what_is_read_again_soon_is_small():
    """Bundles: a 4096 x 4096 matrix is alone; GPT-2's go together as far as a quarter of the L2 cache holds them."""
    alone = phases_of(schedule_of(*[(4096, 4096)] * 4))
    assert alone.count(0) == 4 * 256
    # the next matrix's first tickets, in two parts, and no more
    first_apply = alone.index(PHASES.index("apply"))
    assert alone[:first_apply].count(0) == 256 + 2 * 66
    shape, itemsize = (768, 3072), 2
    together = schedule_of(*[shape] * 12)
    per_bundle = HOPPER.l2_bytes // 4 // (shape[0] * shape[1] * itemsize)
    (tickets,) = {row["tickets"] for row in rows_of(together)}
    applied = phases_of(together)
    assert per_bundle == 2
    assert applied[: applied.index(PHASES.index("columns"))].count(0) == per_bundle * tickets + min(
        66, per_bundle * tickets
    )
