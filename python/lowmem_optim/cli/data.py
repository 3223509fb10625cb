"""The text to train on, split into training and validation bytes, and the batches drawn from it."""

import codecs
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

MAX_BYTES = 32 * 2**20  # far more than a default run reads, and quick to load
VALIDATION_EVERY = 20  # one file in 20, or the last twentieth of a single file: 5 %
NOT_LIBRARY_CODE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Training and validation bytes (uint8), and where they come from."""

    training: Tensor
    validation: Tensor
    source: str
    files: int


@dataclass(frozen=True)
class Batch:
    """Input bytes and the bytes that follow them, each int64 (batch, context)."""

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.targets.to(device))


def load_text(path: Path | None, context: int, max_bytes: int = MAX_BYTES) -> Text:
    """Reads a file, all text files of a folder, or (None) the Python standard library's modules.

    At most `max_bytes` bytes are read. Raises ValueError when `path` does not exist, or when a split of its text
    is no longer than `context` bytes.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if NOT_LIBRARY_CODE.isdisjoint(f.relative_to(root).parts)]
        source = "the Python standard library"
    elif path.is_dir():
        root, source = path, str(path)
        files = [f for f in path.rglob("*") if not _is_hidden(f.relative_to(path))]
    elif path.exists():
        root, files, source = path.parent, [path], str(path)
    else:
        raise ValueError(f"{path} does not exist; a text file or a folder of text files is needed")

    texts = list(_read_texts(root, files, max_bytes))
    training, validation = _split(texts)
    for name, split in (("training", training), ("validation", validation)):
        if len(split) <= context:
            raise ValueError(
                f"{source} has too little text: {len(split)} bytes for {name} in {len(texts)} text files, "
                f"and one sequence takes {context + 1}; use more text or a smaller --context"
            )
    return Text(_as_tensor(training), _as_tensor(validation), source, len(texts))


def training_batches(data: Tensor, batch_size: int, context: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless random batches from number `start` on; equal seeds give equal batches in equal order."""
    generator = torch.Generator().manual_seed(seed)
    for number in count():
        starts = torch.randint(len(data) - context, (batch_size,), generator=generator)
        if number >= start:
            yield _batch(data, starts, context)


def validation_batches(data: Tensor, batch_size: int, context: int, count: int) -> list[Batch]:
    """`count` batches of sequences spread evenly over the whole of `data`, the same for every optimizer."""
    starts = torch.linspace(0, len(data) - context - 1, count * batch_size, dtype=torch.float64).long()
    return [_batch(data, part, context) for part in starts.split(batch_size)]


def _batch(data: Tensor, starts: Tensor, context: int) -> Batch:
    sequences = data.unfold(0, context + 1, 1)[starts].long()
    return Batch(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous())


def _read_texts(root: Path, files: list[Path], max_bytes: int) -> Iterator[bytes]:
    """Contents of the text files until `max_bytes` are read, in the order of a hash of their paths.

    The hash mixes folders, so that the validation files and the first `max_bytes` are a fair sample of the whole,
    and depends on nothing but paths, so that every machine with the same files trains on the same text.
    """

    def key(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(root).as_posix().encode(errors="surrogateescape")).digest()

    left = max_bytes
    for file in sorted(files, key=key):
        if left and file.is_file() and _is_text(content := _head(file, left)):
            yield content
            left -= len(content)


def _head(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(size)


def _is_text(content: bytes) -> bool:
    try:
        codecs.utf_8_decode(content, "strict", False)  # False: the limit may have cut the last character
    except UnicodeDecodeError:
        return False
    return bool(content) and b"\0" not in content


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split(texts: list[bytes]) -> tuple[bytes, bytes]:
    """Training and validation bytes: whole files to either, since neighbouring lines of a file are much alike."""
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // VALIDATION_EVERY
        return texts[0][:cut], texts[0][cut:]
    training = [text for i, text in enumerate(texts) if i % VALIDATION_EVERY]
    return b"".join(training), b"".join(texts[::VALIDATION_EVERY])


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)  # bytearray: a tensor's memory must be writable
