"""The one origin of randomness: a generator for each named purpose, and no global seed."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 24
"""Random bits in each number: as many as float32 holds."""


def seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends on the whole key, and is the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a fresh CPU generator for this key, such as `(seed, "order", round, client)`."""
    return torch.Generator().manual_seed(seed(*key))


@contextmanager
def seed_global_generators(*key: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators from this key inside the block, and restore them afterwards.

    Args:
        key: key of the seed.
        device: an accelerator whose generator is seeded too; default: only the CPU's.
    """
    accelerators = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        torch.default_generator.manual_seed(seed(*key))
        for accelerator in accelerators:
            with torch.cuda.device(accelerator):
                torch.cuda.manual_seed(seed(*key))
        yield


def uniform(
    seed: Int[Tensor, "*seeds"], stream: int, shape: tuple[int, ...]
) -> Float[Tensor, "..."]:
    """Return uniform numbers in [0, 1) as a function of the seed: equal calls, equal numbers.

    This is a counter-based hash, not a generator: a number depends only on its seed, its stream
    and its place.

    Args:
        seed: one or more seeds.
        stream: separates two uses of the same seed.
        shape: shape of the numbers for each seed.

    Returns:
        Multiples of 2^-24, float32 `[*seeds, *shape]`.
    """
    key = _mix(seed.long() + _mix(torch.tensor(stream + 1, device=seed.device)))
    places = torch.arange(torch.Size(shape).numel(), device=seed.device)
    bits = (_mix(key.unsqueeze(-1) + places) >> 8) & ((1 << BITS) - 1)
    return (bits / (1 << BITS)).reshape(*seed.shape, *shape)


def normal(
    seed: Int[Tensor, "*seeds"], stream: int, shape: tuple[int, ...]
) -> Float[Tensor, "..."]:
    """Return normal numbers of mean 0 and variance 1, likewise; none lies beyond 5.4."""
    # in float32 the midpoint of the last of 2^24 steps would round to 1, whose quantile is infinite
    middle = uniform(seed, stream, shape).double() + 0.5 / (1 << BITS)
    return (math.sqrt(2) * torch.erfinv(2 * middle - 1)).float()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014); int64 wraps, and shifts are made logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
