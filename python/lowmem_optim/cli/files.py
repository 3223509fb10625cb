"""Files and folders that a process killed at any time leaves whole."""

import os
from pathlib import Path


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is either the old one or the new one, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    rename(partial, path)


def rename(path: Path, to: Path) -> None:
    """Renames a file or a folder, for good once this returns."""
    path.replace(to)
    # the name itself lies in the folder
    folder = os.open(to.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
