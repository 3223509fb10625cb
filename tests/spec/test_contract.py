"""A verb, its reference and its launcher are one function in three places."""

import inspect

import pytest

from lowmem_kernels import elementwise
from lowmem_kernels.elementwise import launch, reference


@pytest.mark.parametrize("verb", elementwise.__all__)
@pytest.mark.parametrize("module", [reference, launch], ids=["reference", "launch"])
def test_signatures_agree(verb, module):
    """The verb adds `backend` and the defaults, which the implementations are always given."""
    public = inspect.signature(getattr(elementwise, verb)).parameters
    private = inspect.signature(getattr(module, verb)).parameters
    expected = [(name, p.kind, p.annotation) for name, p in public.items() if name != "backend"]
    assert [(name, p.kind, p.annotation) for name, p in private.items()] == expected


@pytest.mark.parametrize("verb", elementwise.__all__)
def test_docstrings_name_every_argument(verb):
    function = getattr(elementwise, verb)
    documented = inspect.getdoc(function).partition("Args:")[2]
    missing = [name for name in inspect.signature(function).parameters if name not in documented]
    assert not missing
