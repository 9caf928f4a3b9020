"""The examples of a whole federation, before anybody holds them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """One example each, no two equal."""

    texts: list[str]
    words: list[int]
    """Whitespace words and end marks of each: one mark an example, and in PTB one a line."""

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self, indices: Sequence[int]) -> str:
        """SHA-256 of some of them."""
        return hashlib.sha256(json.dumps([self.texts[i] for i in indices]).encode()).hexdigest()


@dataclass(frozen=True)
class Images:
    """Pictures of one size, no two equal."""

    pixels: Tensor
    """uint8 `[images, channels, height, width]`."""
    classes: tuple[str, ...]
    """Names, in the order of their numbers."""

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self, indices: Sequence[int]) -> str:
        """SHA-256 of some of them."""
        return hashlib.sha256(self.pixels[list(indices)].numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """All the examples; every list is as long as they are many."""

    examples: Texts | Images
    groups: list[str] | None
    """Natural client of each."""
    labels: list[str] | None
    """Label of each; of a picture, its class."""
    splits: list[str] | None
    """`train`, `validation` or `test`, where the source fixes them."""
    duplicates: int
    """Identical examples left out."""

    @cached_property
    def fixed(self) -> frozenset[str]:
        """The splits that the source fixes."""
        return frozenset(self.splits or ())
