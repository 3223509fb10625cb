"""What tests of the command line share."""

import random

import pytest


@pytest.fixture
def text(tmp_path):
    """The path of a small text to train on."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(["low", "memory", "kernels", "train"], k=2000)))
    return path
