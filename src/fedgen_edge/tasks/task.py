"""The contract of a task: a frozen backbone, and how to train and judge an adapter for it."""

from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics


@runtime_checkable
class Task(Protocol):
    """What a federation trains; the backbone is its own, and never changes."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Parts of the adapter, trained in this order on each batch; one `Phase()` is all."""
        ...

    def init(self, rng: Generator) -> Leaves:
        """A fresh adapter."""
        ...

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """One client's examples, with every random number that the loss needs."""
        ...

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed loss (nats where it is a likelihood) and count, each `[*clients]`. Deterministic.

        What `batch["mask"]` leaves out adds nothing to either: rows of zeros are padding.
        """
        ...

    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Held-out sums per client, which add up over batches and clients."""
        ...

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Metrics of those sums, `[*clients]` each; `loss` is the one that training lowers."""
        ...
