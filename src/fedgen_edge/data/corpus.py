"""The examples of a whole federation, before anybody holds them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedgen_edge import config
from fedgen_edge.seeds import generator


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
    blanks: int = 0
    """Examples without text, left out."""

    @cached_property
    def fixed_splits(self) -> frozenset[str]:
        """The splits that the source fixes."""
        return frozenset(self.splits or ())


def select_part(
    settings: config.Data,
    candidates: Sequence[int],
    labels: Sequence[str | None],
    splits: Sequence[str | None],
) -> list[int]:
    """Of these examples the public ones, or all the others: drawn label by label, never of a test.

    Args:
        settings: the share that is public, of which labels nothing is, and which part is meant.
        candidates: places of the examples to choose from.
        labels: of each place.
        splits: of each place, where the source fixes them.
    """
    public: set[int] = set()
    for name in sorted({labels[at] or "" for at in candidates} - set(settings.unseen)):
        labeled = [
            at for at in candidates if (labels[at] or "") == name and splits[at] in {None, "train"}
        ]
        order = torch.randperm(
            len(labeled), generator=generator(settings.split_seed, "public", name)
        )
        public |= {labeled[i] for i in order[: round(settings.public * len(labeled))].tolist()}
    return [at for at in candidates if (at in public) == (settings.part == "public")]
