"""The text of `lowmem train`: which files it reads, how it splits them, and the batches it draws."""

import pytest
import torch

from lowmem_optim.cli.data import load_text, training_batches, validation_batches


def marked_files(folder, count, size=100):
    """Text files that each repeat a byte of their own, so that bytes tell the file they come from."""
    for i in range(count):
        (folder / f"{i}.txt").write_bytes(bytes([i + 1]) * size)


def origins(split):
    return set(split.unique().tolist())


def test_files_go_to_either_split_as_a_whole(tmp_path):
    marked_files(tmp_path, 40)
    text = load_text(tmp_path, context=8)
    assert len(origins(text.validation)) == 2
    assert origins(text.training) | origins(text.validation) == set(range(1, 41))
    assert not origins(text.training) & origins(text.validation)
    assert text.files == 40


def test_split_depends_on_relative_paths_alone(tmp_path):
    splits = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        marked_files(tmp_path / name, 40)
        splits.append(load_text(tmp_path / name, context=8))
    assert torch.equal(splits[0].training, splits[1].training)
    assert torch.equal(splits[0].validation, splits[1].validation)


def test_single_file_is_split_by_position(tmp_path):
    content = bytes(range(200)) * 10
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(b % 128 or 1 for b in content))
    text = load_text(path, context=8)
    assert len(text.validation) == 100
    assert bytes(text.training) + bytes(text.validation) == path.read_bytes()


def test_what_is_not_text_or_is_hidden_is_skipped(tmp_path):
    marked_files(tmp_path, 2)
    (tmp_path / "zero.bin").write_bytes(b"\0" * 100)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9" * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"Z" * 100)
    text = load_text(tmp_path, context=8)
    assert text.files == 2
    assert origins(text.training) | origins(text.validation) == {1, 2}


def test_limit_cuts_the_last_file_even_inside_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 500, encoding="utf-8")
    text = load_text(tmp_path / "a.txt", context=8, max_bytes=501)
    assert len(text.training) + len(text.validation) == 501


def test_default_text_is_the_standard_library_without_tests():
    text = load_text(None, context=128)
    assert text.files > 300
    assert len(text.validation) / len(text.training) == pytest.approx(1 / 19, rel=0.5)
    source = text.training.numpy().tobytes()
    assert b"import" in source
    assert b"support.run_unittest" not in source


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_text(tmp_path / "nowhere", context=8)


def test_too_little_text(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 20)
    with pytest.raises(ValueError, match="5 bytes for validation in 1 text files, and one sequence takes 17"):
        load_text(tmp_path / "a.txt", context=16)


def test_training_batches_repeat_with_their_seed():
    data = torch.arange(256, dtype=torch.uint8).repeat(4)
    one, same, other = (training_batches(data, 4, 8, seed) for seed in (0, 0, 1))
    for _ in range(3):
        first, second, third = next(one), next(same), next(other)
        assert torch.equal(first.tokens, second.tokens)
        assert not torch.equal(first.tokens, third.tokens)
        assert torch.equal(first.targets, (first.tokens + 1) % 256)


def test_validation_batches_reach_from_end_to_end():
    data = torch.arange(200, dtype=torch.uint8)
    batches = validation_batches(data, batch_size=4, context=8, count=3)
    assert [batch.tokens.shape for batch in batches] == [(4, 8)] * 3
    assert batches[0].tokens[0, 0] == 0
    assert batches[-1].targets[-1, -1] == 199
