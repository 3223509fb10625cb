"""The pictures of the docs: their scripts run, and the numbers in them are the package's and those of the pages."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from lowmem_kernels.testing import bytes_moved
from lowmem_kernels.testing.models import MODELS, Architecture
from optim.cases import exported

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "pictures"
SCRIPTS = ("choosing", "kernels")


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    return load(request.param, monkeypatch)


def load(name, monkeypatch):
    """A script as a module; they import what they share from their own folder."""
    monkeypatch.syspath_prepend(PICTURES)
    return importlib.import_module(name)


def texts(path):
    """What is written in a picture: matplotlib leaves the text of each group of outlines in a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.DOTALL)


def test_every_script_is_tested():
    assert {path.stem for path in PICTURES.glob("*.py")} == {*SCRIPTS, "picture"}


def test_committed_pictures_are_those_of_the_scripts(script, tmp_path):
    """By what is written in them: outlines differ between versions of matplotlib and of its fonts."""
    for name, draw in script.PICTURES.items():
        draw(tmp_path / name)
        assert texts(tmp_path / name) == texts(PICTURES / name), f"python docs/pictures/{script.__name__}.py"
        assert len(texts(tmp_path / name)) > 10


def test_pages_show_every_picture():
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert {path.name for path in PICTURES.glob("*.svg")} == {*re.findall(r"\(pictures/(\w+\.svg)\)", pages)}


def test_points_are_those_of_the_readme(monkeypatch):
    """State and bytes as README's table has them, for all optimizers."""
    points = {point.label: point for point in load("choosing", monkeypatch).points()}
    assert {label.partition(" (")[0] for label in points} == set(exported())
    expected = {
        "AdamW": (8, 22, 22), "AdamW (bf16 state)": (4, 14, 14), "Lomo": (0, 6, 6), "Adafactor": (0.002, 8, 10),
        "AdaLomo": (0.002, 8, 10), "TorchAdafactor": (0.002, 8, 10), "CAME": (4.004, 20, 22),
        "CAME (bf16 state)": (2.004, 14, 16), "SinkGD": (0, 16, 16), "SinkGD (iterations=1)": (0, 8, 8),
        "SWAN": (0, 10, 10), "APOLLO": (0.5, 9, 9), "APOLLOMini": (0.002, 8, 8), "AdamMini": (4.001, 14, 16),
    }  # fmt: skip
    for label, (state, least, requested) in expected.items():
        point = points[label]
        # README rounds state to three digits; counters of steps are a few bytes of 2^24 elements
        assert point.state == pytest.approx(state, abs=1e-3), label
        # moments of rank 1 are 0.004 bytes for each element
        assert (point.least, point.requested) == pytest.approx((least, requested), abs=5e-3), label
    assert points["Adafactor"].requested == sum(bytes_moved("factored", 1, 2))


def test_stacks_add_up_to_the_plan(monkeypatch):
    """A bar is the plan's total, and its state is split as 2 V d elements say."""
    vocab, hidden = 64, 32
    monkeypatch.setitem(MODELS, "tiny", Architecture(vocab, hidden, 48, 2, 4, 2))
    choosing = load("choosing", monkeypatch)
    entries = (choosing.Entry("SinkGD"), choosing.Entry("SinkGD", {"fallback": "table"}), choosing.Entry("AdamW"))
    bars = choosing.stacks("tiny", entries)
    assert [*bars] == ["SinkGD", "SinkGD, fallback=table", "AdamW"]
    found = choosing.load_model("tiny", torch.bfloat16)
    rest = 2 * vocab * hidden + 5 * hidden  # embedding and head, and five norms
    counters = 4 * (2 + 5)  # a step for each of them
    for entry, each in zip(entries, (8, 4, 8), strict=True):
        parts = bars[entry.label]
        assert parts["state of embeddings, head and vectors"] == each * rest + counters, entry
        choice = choosing.registry.find(entry.name)
        rows = {row.mode: row for row in choosing.plan(found, [choice], dict(entry.options), choosing.SETTING)}
        more = parts["more in an ordinary step"]
        assert sum(parts.values()) - more == rows["fused"].total
        assert sum(parts.values()) == rows["ordinary"].total
    assert bars["SinkGD"]["state of matrices"] == 4 * 14  # steps of seven matrices in each of two layers


def test_tables_and_tickets_are_what_programs_read(monkeypatch):
    kernels = load("kernels", monkeypatch)
    # 2.3, less than one and 2.4 tiles
    assert kernels.table_of((4704, 64, 4912), 2048) == [[0, 4704, 3], [3, 64, 1], [4, 4912, 3]]
    tickets = kernels.tickets_of(kernels.TICKET_SHAPES, kernels.TICKET_ORDER)
    first, second, third = ([t for t in tickets if t.owner == owner] for owner in range(3))
    # 16 rows or 32 columns each; a matrix's phases follow each other, and the last one goes backwards
    for owned, rows in ((first, 4), (second, 3), (third, 6)):
        assert [t.phase for t in owned] == ["look"] * rows + ["columns"] * 8 + ["apply"] * rows
        assert [t.index for t in owned] == [*range(rows), *range(8), *reversed(range(rows))]
    # two tickets of the next bundle between two phases
    between = tickets.index(first[4]) - 2, tickets.index(second[-3]) - 2
    assert [tickets[start : start + 2] for start in between] == [third[:2], third[2:4]]


def test_numbers_of_tiles_are_those_of_the_page(monkeypatch):
    numbers = load("kernels", monkeypatch).numbers()
    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    rows, length, groups, lines = numbers["multinorm"]
    assert (rows, length, groups * lines) == (2, 4096, 4096)
    assert "two of 4096 at a time in registers" in page
    assert f"a ticket: {numbers['projection'][0]} channels" in page
    assert f"some whole rows, or {numbers['factored'][3]} columns of sums" in page
    row_pass, column_pass, span = numbers["lowrank"]
    assert f"{row_pass} rows, {column_pass} columns, or {row_pass} x {span} of the update" in page
