"""Where all randomness begins: a generator for each named purpose, and no global seed."""

import hashlib

import torch


def seed(*key: int | str) -> int:
    """A 63-bit seed that any change of the key changes; equal on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for this key, such as `(seed, "order", round, client)`."""
    return torch.Generator().manual_seed(seed(*key))
