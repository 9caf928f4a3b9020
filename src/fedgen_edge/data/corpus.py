"""The examples of a whole federation, before they are divided among clients."""

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
    """Texts, one per example, no two equal."""

    texts: list[str]
    words: list[int]
    """Words of each text, by whitespace, plus end marks: one per example, in PTB one per line."""

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self, indices: Sequence[int]) -> str:
        """SHA-256 of some of them."""
        return hashlib.sha256(json.dumps([self.texts[i] for i in indices]).encode()).hexdigest()


@dataclass(frozen=True)
class Images:
    """Images of one size, no two equal."""

    pixels: Tensor
    """uint8 `[images, channels, height, width]`."""
    classes: tuple[str, ...]
    """Names, in the order of the class numbers."""

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self, indices: Sequence[int]) -> str:
        """SHA-256 of some of them."""
        return hashlib.sha256(self.pixels[list(indices)].numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """All the examples; every list has one entry per example."""

    examples: Texts | Images
    groups: list[str] | None
    """Natural client of each example."""
    labels: list[str] | None
    """Label of each example; an image's label is its class."""
    splits: list[str] | None
    """`train`, `validation` or `test`, if the source fixes them."""
    duplicates: int
    """Number of identical examples dropped."""
    blanks: int = 0
    """Number of examples without text, dropped."""

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
    """Select the public examples, or all the others: drawn label by label, never from a test split.

    Args:
        settings: the public share, the labels without public examples, and the part to select.
        candidates: indices of the examples to choose from.
        labels: label at each index.
        splits: split at each index, if the source fixes it.
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
