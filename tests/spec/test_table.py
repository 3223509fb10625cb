"""The table of addresses: dimensions are merged only where the walk stays the same, rows say what kernels read."""

import itertools

import pytest
import torch

from lowmem_kernels.table import ALIGNMENT, HEADER, Layout, addresses, collapse, counters, tables
from lowmem_kernels.tensors import Tensors
from lowmem_kernels.testing import SHAPES, make_tensors

ALIGNED, UNALIGNED, STRIDED = Layout(True, False), Layout(False, False), Layout(False, True)


def offsets(extents, operand, numel):
    """Element offsets of logical elements 0 .. numel - 1, walked the slow way."""
    axes = [range(size) for size, *_ in extents]
    steps = [strides[operand] for _, *strides in extents]
    result = [sum(i * s for i, s in zip(index, steps, strict=True)) for index in itertools.product(*axes)]
    assert len(result) == numel
    return result


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((4, 5), [(5, 1), (5, 1)], [(20, 1, 1)]),
        ((4, 5), [(1, 4), (1, 4)], [(4, 1, 1), (5, 4, 4)]),
        ((4, 5), [(5, 1), (1, 4)], [(4, 5, 1), (5, 1, 4)]),
        ((4, 5), [(5, 1), (0, 0)], [(20, 1, 0)]),
        ((4, 5), [(5, 1), (1, 0)], [(4, 5, 1), (5, 1, 0)]),
        ((2, 3, 4), [(12, 4, 1), (24, 4, 1)], [(2, 12, 24), (12, 1, 1)]),
        ((2, 3, 4), [(24, 8, 2), (12, 4, 1)], [(24, 2, 1)]),
        ((3, 1, 4), [(4, 99, 1), (4, 7, 1)], [(12, 1, 1)]),
        ((1, 1), [(5, 5), (1, 1)], []),
        ((), [(), ()], []),
    ],
)
def test_collapse(shape, strides, expected):
    assert collapse(shape, *strides) == expected


def test_collapse_keeps_every_address():
    """All permutations and gaps of a 4-D shape with a dimension of 1, for a parameter and a gradient of their own."""
    shape = (2, 3, 1, 4)
    layouts = []
    for order in itertools.permutations(range(4)):
        layouts.append(torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(4)]).stride())
    layouts += [(100, 20, 3, 2), (0, 4, 4, 1), (4, 0, 0, 1), (0, 0, 0, 0)]
    for one, two in itertools.product(layouts, layouts):
        merged = collapse(shape, one, two)
        whole = list(zip(shape, one, two, strict=True))
        for operand in (0, 1):
            assert offsets(merged, operand, 24) == offsets(whole, operand, 24)
        assert len(merged) <= 3


def test_layouts_rows_and_tiles():
    """Every case in one call: three tables at most, each parameter in one row of one of them, tiles counted through."""
    params, grads = zip(*(make_tensors(case, torch.bfloat16, 0) for case in SHAPES), strict=True)
    keys = [2**31 + i for i in range(len(params))]
    found = list(tables((params, grads), keys, tile=512))
    assert {t.layout for t in found} == {ALIGNED, UNALIGNED, STRIDED}
    assert len(found) == 3
    seen = []
    for table in found:
        values, columns = table.values.tolist(), HEADER + 2
        assert table.tile == 512
        first_tile = 0
        for row in range(table.rows):
            first, numel, key, dims, ndim, *addresses = values[row * columns : (row + 1) * columns]
            index = key - 2**31
            seen.append(index)
            param, grad = params[index], grads[index]
            assert first == first_tile
            assert numel == param.numel()
            assert addresses == [param.data_ptr(), grad.data_ptr()]
            contiguous = param.is_contiguous() and grad.is_contiguous()
            assert table.layout.strided is not contiguous
            assert not table.layout.aligned or not any(address % ALIGNMENT for address in addresses)
            extents = [tuple(values[dims + 3 * d : dims + 3 * d + 3]) for d in range(ndim)]
            expected = [] if contiguous else collapse(param.shape, param.stride(), grad.stride())
            assert extents == expected[::-1]
            first_tile += max(1, -(-numel // 512))
        assert table.tiles == first_tile
    assert sorted(seen) == list(range(len(params)))


@pytest.mark.parametrize("odd_one", range(4))
def test_one_misaligned_tensor_of_many_columns(odd_one):
    columns = [[torch.zeros(64)] for _ in range(4)]
    assert [t.layout for t in tables(columns, [0], 512)] == [ALIGNED]
    columns[odd_one] = [torch.zeros(65)[1:]]
    assert [t.layout for t in tables(columns, [0], 512)] == [UNALIGNED]


def test_step_counters_need_no_alignment():
    """Counters are views of one vector, four bytes apart: they must not cost their parameters 16-byte accesses."""
    steps = torch.zeros(4).unbind()
    params, grads = ([torch.zeros(8, 8) for _ in range(4)] for _ in range(2))
    assert [(t.layout, t.rows) for t in tables((params, grads), [0] * 4, 512, scalars=[steps])] == [(ALIGNED, 4)]


def test_addresses_are_looked_up_once_but_for_the_gradients():
    params, grads = Tensors([torch.zeros(8), torch.zeros(4)]), [torch.ones(8), torch.ones(4)]
    states = Tensors([None, torch.zeros(2)])
    expected = [
        [params[0].data_ptr(), grads[0].data_ptr(), 0, 0],
        [params[1].data_ptr(), grads[1].data_ptr(), states[1].data_ptr(), 0],
    ]
    assert addresses([params, grads, states, None]).tolist() == expected
    moved = [torch.ones(8), grads[1]]
    expected[0][1] = moved[0].data_ptr()
    assert addresses([params, moved, states, None]).tolist() == expected
    # other lists with the same parameters
    other = Tensors([None, None])
    assert addresses([params, moved, other, states]).tolist() == [[*row[:2], 0, row[2]] for row in expected]


def test_uploads_are_kept_while_nothing_changes():
    params, grads = Tensors([torch.zeros(8)]), [torch.zeros(8)]
    (one,) = tables((params, grads), [1], 512)
    (again,) = tables((params, list(grads)), [1], 512)
    assert again.values is one.values
    old = one.values.tolist()
    for column, key in (([torch.zeros(8)], 1), (grads, 2)):
        (other,) = tables((params, column), [key], 512)
        assert other.values.tolist() != old
    # an earlier launch may still read the first one
    assert one.values.tolist() == old


def test_plain_lists_are_looked_at_in_every_call():
    """Also if a tensor has moved since."""
    params, grads = [torch.zeros(8)], [torch.zeros(8)]
    tables((params, grads), [1], 512)
    params[0].set_(torch.zeros(16, 2)[:, 0])
    (moved,) = tables((params, grads), [1], 512)
    assert moved.layout == STRIDED
    assert params[0].data_ptr() in moved.values.tolist()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 1000])
def test_counters(rows):
    device = torch.device("cpu")
    buffer = counters(rows, device)
    assert buffer.dtype is torch.int32
    assert rows <= len(buffer) < 2 * rows
    assert not buffer.any()
    assert counters(rows, device) is buffer
