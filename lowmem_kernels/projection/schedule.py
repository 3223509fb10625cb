"""How a parameter is looked at, in what tiles, where its scratch lies: pure functions of shapes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from ..lines import cut_lines, is_transposed, line_dims
from ..pieces import RowPieces, RowPlace
from ..schedules import Geometry, Row, Schedule, Shape, schedule_of, vectors
from ..table import Layout
from ..tickets import Order, Stage
from .fields import FIELDS, SUMS
from .rule import ApolloRule, Sides, piece_sides, sides_of

#: Most ranks of a tile of sums: with 128 channels 32768 sums, 128 registers of each thread of 8 warps. Of a higher rank
#: the gradient is read once for each 256.
MAX_RANKS = 256

#: Least ranks of a product of matrices (and of AMD's): fewer are padded with zeros.
MIN_RANKS = 16

#: Tiles of products, channels x contracted: of bfloat16; of other dtypes, which take three products of TF32 and twice
#: the room; and where elements are accessed one by one, with an address for each.
DOT_TILE, EXACT_DOT_TILE, RAGGED_DOT_TILE = Shape(128, 64), Shape(64, 32), Shape(32, 32)

#: Tiles of rank 1 and of what is not projected, where the contracted elements of a channel lie in one piece, and where
#: they do not. 32 elements for each thread of 8 warps, 4 of 16 where elements are accessed one by one.
TILE, CROSS_TILE, RAGGED_TILE = Shape(32, 256), Shape(64, 128), Shape(16, 128)

#: Tiles of the last read: channels that lie in one piece, and those that do not; and elements of a tile of moments.
APPLY_TILE, CROSS_APPLY_TILE, RAGGED_APPLY_TILE = Shape(16, 256), Shape(64, 64), Shape(8, 256)
MOMENT_ELEMENTS = 2048

#: Elements of a ticket of moments: each costs 20 bytes, where one of the first read costs 2.
MOMENT_TICKET = 32768

#: Bytes of projected gradients of a bundle, unless a single parameter needs more: the scratch has two slots of that
#: size. 16 matrices of 4096 x 4096 at rank 256 are 512 tickets of the first read, four for each processor of an H100.
SCRATCH_BYTES = 64 * 2**20


class Route(NamedTuple):
    """How a parameter is looked at; parameters that share it go into one launch.

    layout: what may be assumed of its tensors.
    lines_by_8, length_by_8, rank_by_8: whether channels, contracted elements and ranks are multiples of 8.
    right: whether channels are rows (else columns), contiguous: whether a channel lies in one piece.
    mode: how the first read multiplies. "one": rank 1, by sums; "dot": products of matrices; "none": not at all, the
        gradient stands for its projection.
    places: where contracted elements are in the whole, as `project_tile` says.
    tile, ranks: of the first read. moment_tile: channels x ranks. apply_tile: of the last read.
    """

    layout: Layout
    lines_by_8: bool
    length_by_8: bool
    rank_by_8: bool
    right: bool
    contiguous: bool
    mode: str
    places: str
    tile: Shape
    ranks: int
    moment_tile: Shape
    apply_tile: Shape


@dataclass(frozen=True, eq=False)
class ProjectionSchedule(Schedule):
    """Parameters of one launch, and how they are looked at."""

    route: Route


class Work(NamedTuple):
    """What a call does: which of the phases there are (0 reads, 1 makes moments, 2 writes), of what rank.

    narrow: whether products of matrices take bfloat16 as they are.
    """

    phases: tuple[int, ...]
    rank: int
    proj_type: str
    conv: bool
    narrow: bool


class ProjectionPiece(NamedTuple):
    """What a schedule has to know of a parameter of which only some rows are here.

    rows: of the whole. place: which of them are here. The others are where in the sums things start, see `pieces_of`;
    None: they are not there.
    """

    rows: int
    place: RowPlace
    projected: int | None
    squares: int | None
    ok: int | None
    matrix_sums: int | None


def pieces_of(
    shapes: Sequence[tuple[int, ...]], pieces: RowPieces, work: Work, tensor: bool
) -> tuple[tuple[ProjectionPiece, ...], tuple[int, int]]:
    """Return what schedules have to know of parameters in pieces, and how many numbers there are of each sum.

    ``shapes`` are those of what is here; ``tensor``: matrices have one scale. The first sum has the projections and the
    sums of squares of channels whose rows are in several processes, and every parameter's sum of squares; the second,
    of what is left of matrices where channels are rows or nothing is projected, the sums over their moments: 1, of
    ``tensor`` 3, and 2 of each channel whose rows are in several processes.
    """
    wholes = [
        piece_sides(shape, rows, ApolloRule(work.rank, proj_type=work.proj_type))[0]
        for shape, rows in zip(shapes, pieces.rows, strict=True)
    ]
    channels = [0 if side.right else side.matrices * side.channels for side in wholes]
    single = 3 if tensor else 1
    sizes = [
        (
            vectors(crossed * side.rank) if side.projected else 0,
            crossed if side.projected or not tensor else 0,
            1,
            side.matrices * single + (0 if tensor else 2 * crossed) if side.right or not side.projected else 0,
        )
        for side, crossed in zip(wholes, channels, strict=True)
    ]
    starts: list[list[int | None]] = []
    ends = [0]
    # projections come first, since they start at multiples of 4 numbers
    for of_kind in zip(*sizes, strict=True):
        places = accumulate(of_kind[:-1], initial=ends[-1])
        starts.append([place if size else None for place, size in zip(places, of_kind, strict=True)])
        ends.append(ends[-1] + sum(of_kind))
    found = [ProjectionPiece(*of_one) for of_one in zip(pieces.rows, pieces.places, *starts, strict=True)]
    return tuple(found), (ends[3], ends[4] - ends[3])


def sides_here(shape: tuple[int, ...], work: Work, piece: ProjectionPiece | None) -> Sides:
    """Return how a parameter is projected, or what of that is where this piece is."""
    if piece is None:
        return sides_of(shape, work.rank, work.proj_type, work.conv)
    return piece_sides(shape, piece.rows, ApolloRule(work.rank, proj_type=work.proj_type))[1]


def route_of(geometry: Geometry, aligned: bool, work: Work, piece: ProjectionPiece | None = None) -> Route:
    """Return how a parameter is looked at."""
    sides = sides_here(geometry.shape, work, piece)
    transposed = is_transposed(geometry, work.conv)
    strided = geometry.strides is not None and not transposed
    contiguous = sides.right != transposed
    along = sides.contracted if contiguous else sides.channels
    layout = Layout(aligned and along % 8 == 0 and not strided, strided)
    mode = "none" if not sides.projected or 0 not in work.phases else "one" if sides.rank == 1 else "dot"
    ranks = 1 << (sides.rank - 1).bit_length() if sides.rank else 1
    if mode == "dot":
        ranks = min(max(ranks, MIN_RANKS), MAX_RANKS)
        tile = RAGGED_DOT_TILE if not layout.aligned else DOT_TILE if work.narrow else EXACT_DOT_TILE
    else:
        tile = RAGGED_TILE if not layout.aligned else TILE if contiguous else CROSS_TILE
        tile = _narrowed(tile, sides.contracted, contiguous)
    if layout.aligned:
        apply_tile = APPLY_TILE if contiguous else CROSS_APPLY_TILE
    else:
        apply_tile = RAGGED_APPLY_TILE
    apply_tile = _narrowed(apply_tile, sides.contracted, contiguous)
    # of the moments of columns, those of neighbouring channels lie side by side
    moment_ranks = min(ranks, MAX_RANKS if sides.right else 64)
    return Route(
        layout, sides.channels % 8 == 0, sides.contracted % 8 == 0, sides.rank % 8 == 0, sides.right, contiguous, mode,
        "all" if piece is None or sides.right else _places(piece.place, sides.contracted),
        tile, ranks if mode == "dot" else 1, Shape(MOMENT_ELEMENTS // moment_ranks, moment_ranks), apply_tile,
    )  # fmt: skip


def _places(place: RowPlace, count: int) -> str:
    """Say whether four contracted rows of a piece that begin at a multiple of 4 do so in the whole."""
    broken = place.run < count and (place.run % 4 or place.distance % 4)
    return "any" if place.first % 4 or broken else "fours"


def _narrowed(tile: Shape, contracted: int, contiguous: bool) -> Shape:
    """A tile of as many elements with no more places than there are: but 4, or 32 across, that the kernel adds up."""
    places = min(tile.cols, max(4 if contiguous else 32, 1 << max(contracted - 1, 0).bit_length()))
    return Shape(tile.rows * tile.cols // places, places)


def schedules_of(
    geometries: Sequence[Geometry],
    aligned: Sequence[bool],
    keys: Sequence[int],
    draw_keys: Sequence[int],
    work: Work,
    itemsize: int,
    order: Order,
    pieces: Sequence[ProjectionPiece] | None = None,
) -> tuple[ProjectionSchedule, ...]:
    """Return the schedules of a list of parameters: one for each route that occurs.

    Args:
        geometries: of the parameters.
        aligned: whether all tensors of a parameter that are read in tiles start at multiples of 16 bytes.
        keys: of the parameters' rounding noise.
        draw_keys: of their own projections.
        work: what is done.
        itemsize: bytes of a gradient's element.
        order: of the tickets.
        pieces: what there is to know of parameters in pieces; a phase is then one launch of all of them.
    """
    parts = (None,) * len(geometries) if pieces is None else pieces
    kinds: dict[Route, list[int]] = {}
    for i, (geometry, starts_aligned) in enumerate(zip(geometries, aligned, strict=True)):
        kinds.setdefault(route_of(geometry, starts_aligned, work, parts[i]), []).append(i)
    schedules = []
    for route, members in kinds.items():
        rows = [_Row(geometries[i], route, work, draw_keys[i], parts[i]) for i in members]
        # products need more tickets at a time than a bundle that stays in the L2 cache has
        unbundled = route.mode == "dot" or len(work.phases) == 1
        bundling = replace(order, bundle_bytes=1 << 62) if unbundled else order
        frees = 1 if 1 in work.phases else 2
        limit = SCRATCH_BYTES if 1 in work.phases and pieces is None else 1 << 62
        schedule = schedule_of(members, rows, [keys[i] for i in members], itemsize, frees, bundling, limit)
        schedules.append(ProjectionSchedule(**vars(schedule), route=route))
    return tuple(schedules)


class _Row(Row):
    """One parameter of a launch."""

    names = FIELDS
    shared = "projected"

    def __init__(
        self, geometry: Geometry, route: Route, work: Work, draw_key: int, piece: ProjectionPiece | None
    ) -> None:
        sides = sides_here(geometry.shape, work, piece)
        matrices, lines, length = sides.matrices, sides.channels, sides.contracted
        numel = matrices * lines * length
        if not numel and piece is None:
            lines = 0
        self._phases = work.phases
        cut = cut_lines(matrices, lines, length, _first_tile(route, work), 1 << 30)
        moments = cut_lines(matrices, lines, sides.rank, _ticket_tile(route, sides), 1 << 30)
        self._tickets = {0: cut.tickets, 1: moments.tickets, 2: cut.tickets}
        sizes = {
            "squares": matrices * lines,
            "probe": cut.tickets,
            "channel_scale": matrices * lines,
            "sums": matrices * moments.groups * SUMS,
            "factor": matrices,
            "ok": 1,
        }
        projected = vectors(matrices * lines * sides.rank) if route.mode != "none" and 0 in work.phases else 0
        summed = {} if piece is None else {name: getattr(piece, name) for name in ("projected", "squares", "ok")}
        summed = {name: start for name, start in summed.items() if start is not None}
        sizes = {name: size for name, size in sizes.items() if name not in summed}
        if "projected" in summed:
            projected = 0
        dims, starts, counts = line_dims(geometry, route.right, work.conv)
        fields = {
            "matrices": matrices,
            "lines": lines,
            "length": length,
            "group_lines": cut.group_lines,
            "groups": cut.groups,
            "batch": cut.batch,
            "draw_key": draw_key,
            "rank": sides.rank,
            "probes": cut.tickets,
            "moment_lines": moments.group_lines,
            "moment_groups": moments.groups,
            "moment_batch": moments.batch,
            **_piece_fields(piece),
            **counts,
            **summed,
        }
        super().__init__(numel, projected, sizes, fields, dims, starts)

    def stages(self) -> list[Stage]:
        """The phases; the last goes backwards: it begins with what was read last."""
        return [Stage(phase, self._tickets[phase], phase == 2) for phase in self._phases]


def _piece_fields(piece: ProjectionPiece | None) -> dict[str, int]:
    """What a parameter's row says of the rows that are here, and where the sums over processes of it start."""
    if piece is None:
        return dict.fromkeys(("whole_rows", "first_row", "run", "distance", "matrix_sums"), 0)
    first, run, distance = piece.place
    return {
        "whole_rows": piece.rows,
        "first_row": first,
        "run": run,
        "distance": distance,
        "matrix_sums": piece.matrix_sums or 0,
    }


def _first_tile(route: Route, work: Work) -> Shape:
    """The channels of a ticket that reads the gradient, and the places by which small matrices share one."""
    return route.tile if 0 in work.phases else route.apply_tile


def _ticket_tile(route: Route, sides: Sides) -> Shape:
    """The channels of a ticket of moments: as many tiles as make it worth its while."""
    tiles = max(1, MOMENT_TICKET // max(1, sides.rank) // route.moment_tile.rows)
    return Shape(tiles * route.moment_tile.rows, route.moment_tile.cols)
