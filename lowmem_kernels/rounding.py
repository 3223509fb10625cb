"""Stochastic rounding: the noise as a hash, and rounding to bfloat16 with it. The torch twin of fragments.py.

A value between two bfloat16 neighbours goes to the upper one with the probability of its distance from the lower one,
so that the mean of many small updates survives where rounding to nearest would drop each of them. Writing x as its 32
bits, ``round(x) = (bits(x) + u) & 0xffff0000`` with u uniform on 0 .. 65535 does exactly that for either sign.

The noise is a function of *what* is rounded, not of when a generator was called, so every execution order, backend and
sharding draws the same. Element i (contiguous, global) of the tensor ``uid`` at ``step`` takes one half of

    mix32(lo(i // 2) ^ combine(key, hi(i // 2))),    key = combine(combine(tensor_key(seed, uid), step), stream)

where ``stream`` separates what one step writes for one parameter: 0 is the parameter, 1, 2, ... its states in the order
of the verb's arguments. The lower half goes to even i, the upper
to odd i. mix32 is the two-round xor-shift-multiply bijection "lowbias32" found by Chris Wellons' hash prospector: about
ten integer instructions for two elements, which neither a GPU's memory-bound kernel nor a CPU notices much.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .shards import Shard

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
GOLDEN_RATIO = 0x9E3779B9
_WORD = 0xFFFFFFFF


def mix32(word: int) -> int:
    """Return the hash of a 32-bit word: a bijection in which any input bit flips each output bit with p near 1/2."""
    word ^= word >> 16
    word = (word * MULTIPLIER_1) & _WORD
    word ^= word >> 15
    word = (word * MULTIPLIER_2) & _WORD
    return word ^ (word >> 16)


def combine(key: int, word: int) -> int:
    """Fold one more 32-bit word into a 32-bit key. The constant keeps (0, 0) from staying 0."""
    return mix32(((key ^ word) + GOLDEN_RATIO) & _WORD)


@lru_cache(maxsize=1 << 16)
def tensor_key(seed: int, uid: int) -> int:
    """Return the 32-bit key of a tensor from the run's seed and the tensor's uid (both taken modulo 2**64)."""
    key = 0
    for number in (seed, uid):
        key = combine(combine(key, number & _WORD), (number >> 32) & _WORD)
    return key


def stream_key(key: int, step: int, stream: int) -> int:
    """Return the key of one write: the tensor's key, the step it belongs to (from 1) and which tensor is written."""
    return combine(combine(key, step & _WORD), stream)


def noise(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return the int32 noise, 0 .. 65535, of elements ``start .. start + count - 1``; ``key`` is a stream_key."""
    first, last = start // 2, (start + max(count, 1) - 1) // 2
    if first >> 32 != last >> 32:
        boundary = (last >> 32 << 33) - start
        return torch.cat([noise(key, start, boundary, device), noise(key, start + boundary, count - boundary, device)])
    # the bits of int32 arithmetic are those of uint32; only right shifts need their sign bits masked off
    h = _pair_index(last - first + 1, device) + _int32(first & _WORD)
    h.bitwise_xor_(_int32(combine(key, first >> 32)))
    # little endian: the halves of the words, in memory order, are the elements in order
    return _mix32_(h).view(torch.uint16)[start % 2 :][:count].to(torch.int32)


def noise_of_shard(key: int, shard: Shard, start: int, count: int, device: torch.device) -> Tensor:
    """Return `noise` of what elements ``start .. start + count - 1`` of a shard are in the whole tensor."""
    if shard.is_range:
        return noise(key, shard.first + start, count, device)
    index = shard.indices(start, count, device)
    # as `combine`, in int32
    h = _mix32_((index >> 33).int().bitwise_xor_(_int32(key)).add_(_int32(GOLDEN_RATIO)))
    h = _mix32_(h.bitwise_xor_((index >> 1).int()))
    return (h >> ((index & 1) * 16).int()).bitwise_and_(0xFFFF)


def store_stochastic_(target: Tensor, value: Tensor, key: int, start: int, shard: Shard | None = None) -> None:
    """Write fp32 ``value`` into bfloat16 ``target`` with stochastic rounding.

    ``start`` is the index of the first element, in ``shard`` if there is one, else in the whole tensor; ``value`` lists
    the elements in logical order and is overwritten. Inf stays Inf by the arithmetic, NaN by being excluded: its bits
    plus noise could wrap around to a number.
    """
    has_nan = bool(torch.isnan(value.sum()))
    original = value.clone() if has_nan else value
    bits = value.view(torch.int32)
    count, device = value.numel(), value.device
    added = noise(key, start, count, device) if shard is None else noise_of_shard(key, shard, start, count, device)
    bits.add_(added.view(value.shape)).bitwise_and_(~0xFFFF)
    target.copy_(torch.where(original.isnan(), original, value) if has_nan else value)


def _mix32_(h: Tensor) -> Tensor:
    """`mix32` of int32 words, in place."""
    shifted = torch.empty_like(h)
    for shift, multiplier in ((16, MULTIPLIER_1), (15, MULTIPLIER_2), (16, 1)):
        torch.bitwise_right_shift(h, _int32(shift), out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(_int32(_WORD >> shift)))
        if multiplier != 1:
            h.mul_(_int32(multiplier))
    return h


@lru_cache(maxsize=8)
def _pair_index(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _int32(word: int) -> Tensor:
    """A uint32 as a 0-d int32 with its bits; a Python number would be converted once more in every operation."""
    return torch.tensor(word - (1 << 32) if word >> 31 else word, dtype=torch.int32)
