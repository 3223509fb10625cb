"""Files and folders that a process killed at any time leaves whole."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def make_folder(path: Path) -> Path:
    """Makes a folder and those that it lies in; raises ValueError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path}: {error.strerror}") from error
    return path


def make_place(path: Path) -> Path:
    """Makes the folder that a file is to lie in; raises ValueError where that is impossible or the file is a folder."""
    make_folder(path.parent)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is needed")
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process until it leaves, or ends however; raises ValueError where another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process works in {folder}; allowed: when it has ended") from error
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is either the old one or the new one, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    rename(partial, path)


def json_of(value: Any) -> str:
    """JSON for every reader: numbers that are not finite are null, and what else it does not know is Python's text."""
    return json.dumps(_plain(value), indent=1, allow_nan=False, default=repr) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rename(path: Path, to: Path) -> None:
    """Renames a file or a folder, for good once this returns."""
    path.replace(to)
    # the name itself lies in the folder
    folder = os.open(to.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
