"""The torch Philox against the published known answers of Random123."""

import pytest
import torch

from lowmem_kernels.philox import philox4x32

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, output; least significant word first
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name: str) -> None:
    counter, key, expected = (_words(text) for text in KNOWN_ANSWERS[name])
    drawn = philox4x32(key[0] | key[1] << 32, *counter)
    assert [int(word) for word in drawn] == expected
    assert all(word.dtype == torch.int64 for word in drawn)


def test_counters_broadcast() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(5)
    drawn = torch.stack(philox4x32(7, rows, columns, 11, 13))
    assert drawn.shape == (4, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(drawn[:, row, column], torch.stack(philox4x32(7, row, column, 11, 13)))


def test_counters_are_taken_modulo_two_to_the_32() -> None:
    signed = torch.tensor([-1, -(2**31), 5], dtype=torch.int32)
    unsigned = torch.tensor([2**32 - 1, 2**31, 5 + 2**32])
    for left, right in zip(philox4x32(1, signed, 0, 0, 0), philox4x32(1, unsigned, 0, 0, 0), strict=True):
        assert torch.equal(left, right)


def test_words_are_uniform_and_uncorrelated() -> None:
    words = torch.stack(philox4x32(3, torch.arange(1 << 14), 0, 0, 0))
    assert words.min() >= 0
    assert words.max() < 2**32
    uniform = words.double() / 2**32
    # the standard error of a mean of 2**14 uniforms is 0.0023, of a correlation 0.0078
    assert (uniform.mean(1) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(uniform) - torch.eye(4)).abs().max() < 0.04


def test_both_words_of_the_seed_matter() -> None:
    seeds = (5, 5 + 2**33, 5 - 2**63, 2**64 - 1)
    assert len({int(philox4x32(seed, 0, 0, 0, 0)[0]) for seed in seeds}) == len(seeds)
    assert philox4x32(-1, 0, 0, 0, 0) == philox4x32(2**64 - 1, 0, 0, 0, 0)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            philox4x32(seed, 0, 0, 0, 0)
