"""The pages of the optimizers begin alike, and say of constructors what they are."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lowmem_optim
from optim.cases import exported

PAGES = Path(__file__).parents[2] / "docs" / "optimizers"
#: What a reader finds in the first table of each page, besides the constructor or its defaults.
ROWS = ("unit of lr", "state", "bytes per element and step", "launches per step", "good for", "source")
#: Optimizers that share the page of another.
SHARED = {"APOLLOMini": "apollo", "TorchAdafactor": "torch_adafactor"}

pages = pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
named = pytest.mark.parametrize("name", sorted(exported()))


def page_of(name):
    return (PAGES / f"{SHARED.get(name, name.lower())}.md").read_text(encoding="utf-8")


def test_every_optimizer_has_a_page():
    found = {SHARED.get(name, name.lower()) for name in exported()}
    assert found == {page.stem for page in PAGES.glob("*.md")}


@pages
def test_pages_begin_alike(page):
    """A rule in a box, then a table with the same rows, then the rest."""
    _, *sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sections[0].startswith("At a glance\n\n```text\n")
    first_cells = [line.split("|")[1].strip() for line in sections[0].splitlines() if line.startswith("|")]
    for row in ROWS:
        assert sum(cell.startswith(row) for cell in first_cells) == 1, row


@named
def test_constructors_are_what_the_pages_say(name):
    """Order, kinds and defaults of all arguments; APOLLOMini's, which are in a sentence, without two of APOLLO's."""
    cls = getattr(lowmem_optim, name)
    real = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
    said = constructor(page_of(name), "APOLLO" if name == "APOLLOMini" else name)
    if name == "APOLLOMini":
        assert "has no rank and scale_type,\nand a scale of 128" in page_of(name)
        said = {key: value for key, value in said.items() if key not in ("rank", "scale_type")} | {"scale": 128.0}
    expected = {p.name: p.default for p in real if p.default is not p.empty}
    assert [*said][: len(expected)] == [*expected]
    # the rest are options that only this optimizer has
    own = {key: cls.common_defaults[key] for key in [*said][len(expected) :]}
    assert said == expected | own


def constructor(page, name):
    """{argument: default} of the call in code of this name that ends in **options."""
    calls = re.findall(rf"`({name}\(params, [^`]*\*\*options\))`", page)
    assert len(calls) == 1, calls
    arguments = ast.parse(f"def {calls[0]}: pass").body[0].args
    usual = dict(zip([a.arg for a in arguments.args[1:]], arguments.defaults, strict=True))
    keywords = {a.arg: default for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    return {key: ast.literal_eval(value) for key, value in (usual | keywords).items()}
