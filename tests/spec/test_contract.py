"""A verb, its reference and its launcher are one function in three places."""

import importlib
import inspect

import pytest

from lowmem_kernels import elementwise, factored, lowrank, multinorm, projection, whitening

FAMILIES = [elementwise, factored, multinorm, projection, whitening, lowrank]
VERBS = [(family, name) for family in FAMILIES for name in family.__all__ if name.islower()]


def name_of(parameter):
    """Of a module the last part."""
    return parameter if isinstance(parameter, str) else parameter.__name__.rpartition(".")[2]


def test_verbs_are_found():
    """A class beside them is no verb."""
    names = [name for _, name in VERBS]
    assert names == [
        *("adamw_", "grad_stats", "scaled_update_"),
        *("confidence_update_", "factored_update_"),
        *("rank1_apply_", "sinkhorn_scales", "sinkhorn_update_"),
        *("apollo_update_", "channel_apply_", "project", "projection_matrix"),
        *("whiten_", "whitened"),
        "partial_momentum_update_",
    ]
    assert all(inspect.isfunction(getattr(family, name)) for family, name in VERBS)


@pytest.mark.parametrize(("family", "verb"), VERBS, ids=name_of)
@pytest.mark.parametrize("implementation", ["reference", "launch"])
def test_signatures_agree(family, verb, implementation):
    """The verb adds `backend` and the defaults, which the implementations are always given."""
    module = importlib.import_module(f"{family.__name__}.{implementation}")
    public = inspect.signature(getattr(family, verb)).parameters
    private = inspect.signature(getattr(module, verb)).parameters
    expected = [(name, p.kind, p.annotation) for name, p in public.items() if name != "backend"]
    assert [(name, p.kind, p.annotation) for name, p in private.items()] == expected


@pytest.mark.parametrize(("family", "verb"), VERBS, ids=name_of)
def test_docstrings_name_every_argument(family, verb):
    function = getattr(family, verb)
    documented = inspect.getdoc(function).partition("Args:")[2]
    missing = [name for name in inspect.signature(function).parameters if name not in documented]
    assert not missing
