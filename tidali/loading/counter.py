"""Random numbers as a pure function of (seed, epoch, index): no generator state to save, none to keep in step between ranks.

The function is splitmix64: the output mix of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA
2014), over a Weyl sequence. Integers only, so a CPU and a GPU give the same numbers. numpy's and torch's own generators promise
no stable stream between versions for permutations; this one cannot change unless this file does.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: splitmix64's Weyl increment
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MASK = 2**64 - 1
_UNIFORM_BITS = 24  # what float32 holds exactly, so that 1.0 cannot come out


def mix_int(value: int) -> int:
    """splitmix64's bijection on 0..2**64 - 1, on the host."""
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor & _MASK
    return value


def key(*parts: int) -> int:
    """One 64-bit key of several integers of any sign; another order gives another key."""
    state = 0
    for part in parts:
        state = mix_int((state + _GOLDEN + part) & _MASK)
    return state


def mix(values: Tensor) -> Tensor:
    """`mix_int` of each element: int64 in, int64 out, both read as unsigned. int64 products wrap modulo 2**64."""
    for shift, factor in _MIX:
        logical = (values >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts the sign in
        values = (values ^ logical) * _signed(factor)
    return values


def hashes(key: int, indices: Tensor) -> Tensor:
    """64 random bits for each index: element ``i`` is the ``indices[i]``-th output of a splitmix64 generator seeded by ``key``.

    A bijection of the index, so distinct indices never tie.
    """
    return mix((indices + 1) * _signed(_GOLDEN) + _signed(key))


def uniforms(key: int, indices: Tensor, count: int) -> Tensor:
    """``count`` independent numbers for each index, uniform in [0, 1).

    Returns:
        (N, count) float32 on the indices' device.
    """
    columns = torch.arange(1, count + 1, device=indices.device) * _signed(_GOLDEN)
    bits = mix(hashes(key, indices)[:, None] + columns)
    top = (bits >> (64 - _UNIFORM_BITS)) & ((1 << _UNIFORM_BITS) - 1)
    return top.to(torch.float32) * 2.0**-_UNIFORM_BITS


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - 2**64 if value >= 2**63 else value
