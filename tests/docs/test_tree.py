"""The tree in CONTRIBUTING.md against the files that there are."""

import re
import sys

import lowmem_optim
from docs.pages import ROOT, blocks_of


def test_the_tree_names_what_there_is():
    """Every file that it names is there, and it names every module of the two packages but those of optimizers."""
    (tree,) = [block.code for block in blocks_of("CONTRIBUTING.md") if block.language == "text"]
    named = set(re.findall(r"\w+\.py\b", tree))
    assert named <= {path.name for path in ROOT.glob("*/**/*.py")}
    exported = [getattr(lowmem_optim, name) for name in lowmem_optim.__all__]
    optimizers = {sys.modules[each.__module__].__file__ for each in exported if isinstance(each, type)}
    for package in (ROOT / "lowmem_kernels", ROOT / "python" / "lowmem_optim"):
        modules = {path.name for path in package.glob("*.py") if str(path) not in optimizers}
        assert modules - {"__init__.py"} <= named
