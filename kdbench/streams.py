"""Random streams: every random number of a run follows from one seed and a name.

Source: the counter-based idea is that of Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405; the
mixing function is the finaliser of SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_seed(seed: int, name: str, *counters: int) -> int:
    """Return the 63-bit seed of the stream `name` of a run (and of its visit, epoch, ... in `counters`)."""
    text = "\x1f".join([str(int(seed)), name, *(str(int(c)) for c in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, name: str, *counters: int) -> torch.Generator:
    """Return a CPU generator at the start of the stream `name`."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *counters))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(seed: int, example_id: Tensor, draw: int, position: int | Tensor) -> Tensor:
    """Return one uniform number in [0, 1) per row, a function of its four keys alone.

    Args: `example_id` [B] int64; a tensor of positions broadcasts against it. Returns float64 [B], or of the
    broadcast shape, with 53 random bits: no state, no order, no batch size.
    """
    start = torch.full_like(example_id, stream_seed(seed, "sampling"))
    h = _mix(_mix(_mix(start) ^ example_id) ^ draw)
    return _shift(_mix(h ^ position), 11).double() * 2.0**-53
