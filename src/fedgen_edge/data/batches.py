"""Pack documents into blocks, and draw one client's batches from its blocks.

Randomness comes from `(seed, round, client)` alone, so two methods in one table train on the same
batches in the same order, and so do two engines.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, zip_longest
from typing import overload

import numpy as np
import torch

from fedgen_edge.seeds import generator
from fedgen_edge.types import Batch

FIELDS = ("tokens", "labels", "mask", "segment", "position")
MARKS = ("epoch", "last")
"""Fields with a batch's position in its client's work: for the training loop, not the model."""
SHARDS_PER_TABLE = 64
"""Clients whose examples are stored in one table."""


@dataclass(frozen=True)
class Shard:
    """One client's packed examples: `[rows, ...]` each."""

    name: str
    train: Batch
    validation: Batch
    test: Batch

    @property
    def weight(self) -> float:
        """Number of training examples, the weight in averages."""
        return float(count_rows(self.train))


class Shards(Sequence[Shard]):
    """Every client's examples in a few tables, so that a client costs little more than its rows.

    One growing table would be moved again and again, and fragment the memory.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        """Copy the shards in, some at a time: the iterable may produce them lazily."""
        self._names: list[str] = []
        self._ends: list[list[int]] = []
        self._tables: list[Batch] = []
        source = iter(shards)
        while group := list(islice(source, SHARDS_PER_TABLE)):
            self._names += [shard.name for shard in group]
            parts = [part for own in group for part in (own.train, own.validation, own.test)]
            self._ends.append([0, *itertools.accumulate(map(count_rows, parts))])
            self._tables.append({k: torch.cat([part[k] for part in parts]) for k in parts[0]})

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, at: int) -> Shard: ...
    @overload
    def __getitem__(self, at: slice) -> list[Shard]: ...
    def __getitem__(self, at: int | slice) -> Shard | list[Shard]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        index = range(len(self))[at]
        number, place = divmod(index, SHARDS_PER_TABLE)
        spans = pairwise(self._ends[number][3 * place : 3 * place + 4])
        table = self._tables[number]
        return Shard(
            self._names[index],
            *({k: v[low:high] for k, v in table.items()} for low, high in spans),
        )


@dataclass(frozen=True)
class Budget:
    """How much one client trains in one round."""

    batch: int
    """Examples in a step."""
    epochs: int = 1
    steps: int | None = None
    """Steps in an epoch; None means one pass over the client's examples."""

    def count_epoch_steps(self, examples: Batch) -> int:
        """Count the steps in an epoch on these examples."""
        return self.steps or -(-count_rows(examples) // self.batch)


def count_rows(examples: Batch) -> int:
    """Count the examples in a batch without a client axis."""
    return len(next(iter(examples.values())))


def subsample_evenly(examples: Batch, max_rows: int) -> Batch:
    """Return at most `max_rows` evenly spaced examples; 0 means all."""
    count = count_rows(examples)
    if not max_rows or max_rows >= count:
        return examples
    chosen = torch.arange(max_rows) * count // max_rows
    return {k: v[chosen] for k, v in examples.items()}


def split_rows(examples: Batch, axis: int, max_rows: int) -> Iterator[Batch]:
    """Yield all the examples, at most `max_rows` at a time, along this axis."""
    count = next(iter(examples.values())).shape[axis]
    for at in range(0, count, max_rows):
        yield {k: v.narrow(axis, at, min(max_rows, count - at)) for k, v in examples.items()}


def pack(
    documents: Sequence[Sequence[int]], words: Sequence[int], length: int, vocabulary: int = 2**31
) -> Batch:
    """Cut token streams into blocks in which every token but each document's first is predicted.

    Args:
        documents: token ids of each, including start and end tokens.
        words: words of each document, divided over its tokens so that a part counts in proportion.
        length: tokens in a block.
        vocabulary: larger than every token id.

    Returns:
        `tokens`, `labels` (the next token), `mask` (where there is one), `segment` (the document
        within its block, from 1; 0 is padding) and `position`, `[rows, length]` each, in
        the smallest integer types, since every client's are in memory; `words`, `[rows]`. Documents
        are concatenated; one that crosses a block's end continues in the next block without its
        earlier context.
    """
    counts = torch.tensor([len(ids) - 1 for ids in documents], dtype=torch.int64)
    all_tokens = torch.from_numpy(np.fromiter(chain.from_iterable(documents), np.int32))
    ends = (counts + 1).cumsum(0)
    is_last, is_first = torch.zeros(2, len(all_tokens), dtype=torch.bool)
    is_last[ends - 1], is_first[ends - counts - 1] = True, True
    document = torch.arange(1, len(documents) + 1, dtype=torch.int32).repeat_interleave(counts)
    document_length = counts.repeat_interleave(counts)
    word_counts = torch.tensor(words, dtype=torch.int64).repeat_interleave(counts)
    offset = torch.arange(len(document_length)) - (counts.cumsum(0) - counts).repeat_interleave(
        counts
    )
    word_counts = (
        offset + 1
    ) * word_counts // document_length - offset * word_counts // document_length
    token, label, mask, document, word_counts = (
        torch.nn.functional.pad(v, (0, -len(document_length) % length)).reshape(-1, length)
        for v in (
            all_tokens[~is_last],
            all_tokens[~is_first],
            torch.ones_like(document),
            document,
            word_counts,
        )
    )
    segment_starts = torch.ones_like(document, dtype=torch.bool)
    segment_starts[:, 1:] = document[:, 1:] != document[:, :-1]
    block_offset = torch.arange(length, dtype=torch.int32).expand_as(document)
    position = block_offset - torch.where(segment_starts, block_offset, 0).cummax(1).values
    segment = segment_starts.int().cumsum(1, dtype=torch.int32) * mask
    token_dtype, position_dtype = _choose_dtype(vocabulary - 1), _choose_dtype(length)
    dtypes = (token_dtype, token_dtype, torch.bool, position_dtype, position_dtype)
    values = (token, label, mask, segment, position)
    packed_fields = {
        k: v.to(t).contiguous() for k, v, t in zip(FIELDS, values, dtypes, strict=True)
    }
    return {**packed_fields, "words": word_counts.sum(1, dtype=torch.int32)}


def _choose_dtype(highest: int) -> torch.dtype:
    dtypes = (torch.uint8, torch.int16)
    return next((kind for kind in dtypes if highest <= torch.iinfo(kind).max), torch.int32)


def make_batches(examples: Batch, budget: Budget, *key: int | str) -> Iterator[Batch]:
    """Yield one client's batches of one round, reshuffled in each pass over its examples.

    Args:
        examples: `[rows, ...]` each.
        budget: epochs, and steps in each.
        key: seeds the order.

    Yields:
        Batches with two more scalar fields, the `MARKS`: `epoch`, from 0, and `last`, true for an
        epoch's last batch.
    """
    steps_per_epoch = budget.count_epoch_steps(examples)
    chosen_rows = islice(
        _shuffle_passes(count_rows(examples), budget.batch, *key), steps_per_epoch * budget.epochs
    )
    for step, row_indices in enumerate(chosen_rows):
        marks = {
            "epoch": torch.tensor(step // steps_per_epoch),
            "last": torch.tensor(step % steps_per_epoch == steps_per_epoch - 1),
        }
        yield {**{k: v[row_indices] for k, v in examples.items()}, **marks}


def _shuffle_passes(count: int, batch: int, *key: int | str) -> Iterator[torch.Tensor]:
    """Yield the row indices of batch after batch, without end."""
    for number in itertools.count():
        order = torch.randperm(count, generator=generator(*key, number))
        yield from order.split(batch)


def count_steps(examples: Batch, budget: Budget) -> int:
    """Count the batches that `make_batches` yields."""
    return budget.epochs * budget.count_epoch_steps(examples)


def interleave(streams: Sequence[Iterator[Batch]]) -> Iterator[Batch]:
    """Yield one batch of each stream in turn, until all have ended: the order for pooled data."""
    for turn in zip_longest(*streams):
        yield from (batch for batch in turn if batch is not None)


def stack(streams: Sequence[Iterator[Batch]]) -> Iterator[Batch]:
    """Combine the batches of several clients, for as many clients as still have some.

    Args:
        streams: one of each client; none longer than the one before it.

    Yields:
        `[clients, ...]` each; shorter batches are padded with zeros, which are not counted.
    """
    for turn in zip_longest(*streams):
        members = [batch for batch in turn if batch is not None]
        if any(batch is None for batch in turn[: len(members)]):
            raise ValueError("a stack's longest streams come first")
        yield stack_examples(members)


def stack_examples(members: Sequence[Batch]) -> Batch:
    """Stack examples of several clients on a first client axis; zeros pad the shorter ones."""
    return {k: _pad_and_stack([m[k] for m in members]) for k in members[0]}


def _pad_and_stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    if values[0].ndim == 0:
        return torch.stack(list(values))
    max_length = max(len(v) for v in values)
    return torch.stack(
        [torch.cat([v, v.new_zeros(max_length - len(v), *v.shape[1:])]) for v in values]
    )
