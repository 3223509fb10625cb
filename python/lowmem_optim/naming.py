"""Objects that are named as module:attribute, what a constructor takes, and errors in a line."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .base import LowMemOptimizer


def load_named(argument: str, name: str, allowed: str) -> Any:
    """What module:attribute names; raises ValueError about ``argument`` where nothing can be imported.

    Modules are also looked for in the current folder, as `python -m` does: an installed command does not by itself.
    """
    where, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{argument} is {name!r}: it has no colon; allowed: {allowed}")
    try:
        with importing_from_here():
            found: Any = importlib.import_module(where)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # anything that somebody else's code raises
        raise ValueError(f"{argument} is {name!r}: {line_of(error)}; allowed: {allowed}") from error
    return found


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Looks for modules in the current folder first."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def arguments_of(cls: type) -> set[str]:
    """Names of a constructor's arguments; this package's optimizers take the common options as **options."""
    parameters = inspect.signature(cls).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return names | cls.common_defaults.keys() if issubclass(cls, LowMemOptimizer) else names


def line_of(error: BaseException) -> str:
    """The type and the first line of an error."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
