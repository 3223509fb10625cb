"""Schedules and plans of the whitening kernels, and the precision of the solver's products."""

import pytest
import torch

from lowmem_kernels.schedules import Geometry
from lowmem_kernels.table import Layout
from lowmem_kernels.testing.models import model_shapes
from lowmem_kernels.whitening import WhiteningRule, solver
from lowmem_kernels.whitening.launch import WhiteningPlan, plan_products
from lowmem_kernels.whitening.schedule import FIELDS, WORKSPACE_BYTES, block_of, group_size, schedules_of

ALIGNED, MISALIGNED, STRIDED = Layout(True, False), Layout(False, False), Layout(False, True)


def schedule_of(*shapes, conv=False):
    (found,) = schedules_of([Geometry(shape, None) for shape in shapes], [True] * len(shapes), range(len(shapes)), conv)
    return found


def rows_of(found):
    rows = found.values[: found.matrices * len(FIELDS)].reshape(-1, len(FIELDS))
    return [dict(zip(FIELDS, row, strict=True)) for row in rows.tolist()]


def test_tiles_and_warps():
    assert [block_of(k, ALIGNED) for k in (1, 512, 513, 4096)] == [64, 64, 128, 128]
    assert block_of(4096, MISALIGNED) == block_of(4096, STRIDED) == 64
    assert plan_products(128, True, ALIGNED, 32) == WhiteningPlan(128, 16, 8, 2, "tf32x3")
    assert plan_products(64, True, ALIGNED, 32) == WhiteningPlan(64, 16, 4, 2, "tf32x3")
    assert plan_products(64, True, STRIDED, 32) == WhiteningPlan(64, 16, 8, 2, "tf32x3")
    assert plan_products(128, False, ALIGNED, 32) == WhiteningPlan(128, 32, 8, 2, "tf32")
    for exact in (True, False):
        assert plan_products(128, exact, ALIGNED, 64) == WhiteningPlan(128, 32, 8, 2, "ieee")


def test_small_problems_are_solved_together_and_large_ones_one_at_a_time():
    assert [group_size(k) for k in (1, 64, 768, 4096, 8192)] == [WORKSPACE_BYTES // 20, 3276, 22, 1, 1]
    assert all(group_size(k) == 1 or group_size(k) * 20 * k * k <= WORKSPACE_BYTES for k in range(1, 6000, 7))


def test_launches_do_not_grow_with_the_number_of_small_parameters():
    shapes = [(96, 64), (64, 96), (64, 64)]
    groups = [len(schedule_of(*shapes * count).groups) for count in (1, 10, 300)]
    assert groups == [2, 2, 2]


def test_groups_of_a_large_model():
    """Llama-7B, one K x K problem of 4096 at a time; every matrix is in one group."""
    shapes = [s for s in model_shapes("llama-7b").values() if len(s) == 2]
    found = schedule_of(*shapes)
    assert found.matrices == len(shapes) == sum(group.count for group in found.groups)
    assert all(group.count == 1 for group in found.groups)
    assert [g.first for g in found.groups] == list(range(len(shapes)))


def test_rows_of_a_schedule():
    """Groups are of one side and size; a square matrix takes the right Gram matrix."""
    found = schedule_of((40, 24), (3, 16, 48), (24, 24), (0, 8), (16, 64))
    assert [(g.right, g.size, g.first, g.count) for g in found.groups] == [(False, 16, 0, 4), (True, 24, 4, 2)]
    rows = rows_of(found)
    assert [row["owner"] for row in rows] == [1, 1, 1, 4, 0, 2]
    assert [row["start"] for row in rows] == [0, 768, 1536, 0, 0, 0]
    assert [row["param_offset"] for row in rows] == [row["start"] for row in rows]
    assert [row["first_row"] for row in rows] == [0, 16, 32, 48, 64, 104]
    assert [row["stats_tile"] for row in rows] == [0, 2, 4, 6, 8, 13]
    assert found.stats_tiles == 16
    assert found.rows == 128
    assert [row["apply_tile"] for row in rows] == list(range(6))
    assert [group.apply_tiles for group in found.groups] == [range(4), range(4, 6)]


def test_folded_convolutions():
    (row,) = rows_of(schedule_of((6, 4, 2, 3), conv=True))
    assert (row["m"], row["n"]) == (6, 24)


def test_columns_of_strided_parameters():
    """Offsets of columns are in the table, once for the same shape and strides; channels last, and transposed."""
    shape, last = (6, 4, 2, 3), (24, 1, 12, 4)
    geometry = Geometry(shape, (last, last))
    (found,) = schedules_of([geometry, geometry], [True, True], [0, 1], True)
    assert found.layout == STRIDED
    first, second = rows_of(found)
    assert first["param_columns"] == first["grad_columns"] == second["param_columns"] == 2 * len(FIELDS)
    columns = torch.arange(24).as_strided(shape[1:], last[1:]).flatten().tolist()
    assert found.values[2 * len(FIELDS) :].tolist() == columns
    assert first["param_row_stride"] == first["grad_row_stride"] == 24
    (found,) = schedules_of([Geometry((2, 5, 7), ((35, 7, 1), (35, 1, 5)))], [True], [0], False)
    _, second = rows_of(found)
    assert (second["param_row_stride"], second["grad_row_stride"]) == (7, 1)
    assert second["param_offset"] == second["grad_offset"] == 35
    assert found.values[second["grad_columns"] :].tolist() == [5 * i for i in range(7)]


@pytest.fixture
def settings():
    """Where torch keeps the precision of products."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    yield settings
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("asked", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("name", ["coupled", "polynomial"])
def test_products_are_exact_whatever_the_program_has_asked_for(name, asked, settings, monkeypatch):
    """With TF32 products the coupled iteration explodes; what the program has set is put back, after an error too."""
    for setting in settings:
        setting.fp32_precision = asked
    seen = []
    solve = getattr(solver, f"_{name}")

    def spy(*args):
        seen.append([setting.fp32_precision for setting in settings])
        return solve(*args)

    monkeypatch.setattr(solver, f"_{name}", spy)
    solver.inverse_root(torch.eye(3)[None], WhiteningRule(solver=name), lift=False)
    assert seen == [["ieee" if name == "coupled" else "tf32", "ieee"]]
    assert [setting.fp32_precision for setting in settings] == [asked, asked]

    def fails(*args):
        raise MemoryError

    monkeypatch.setattr(solver, f"_{name}", fails)
    with pytest.raises(MemoryError):
        solver.inverse_root(torch.eye(3)[None], WhiteningRule(solver=name), lift=False)
    assert [setting.fp32_precision for setting in settings] == [asked, asked]


def test_tf32_products_make_the_coupled_iteration_explode(monkeypatch):
    """Why they are guarded against: emulated by rounding factors to 11 bits, singular values are beyond 1e3."""

    def rounded(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def baddbmm_(self, a, b, *, beta, alpha):
        assert beta == 0
        return self.copy_(alpha * (rounded(a) @ rounded(b)))

    left, right = (torch.linalg.qr(torch.randn(96, 96))[0] for _ in range(2))
    x = left * torch.logspace(0, -3, 96) @ right
    exact, _ = solver.inverse_root((x @ x.T)[None], WhiteningRule(), lift=False)
    monkeypatch.setattr(torch.Tensor, "baddbmm_", baddbmm_)
    coarse, _ = solver.inverse_root((x @ x.T)[None], WhiteningRule(), lift=False)
    size = torch.linalg.matrix_norm(x @ x.T).sqrt()
    assert torch.linalg.matrix_norm(exact[0] @ x, 2) / size <= 1.65
    assert torch.linalg.matrix_norm(coarse[0] @ x, 2) / size >= 1e3
