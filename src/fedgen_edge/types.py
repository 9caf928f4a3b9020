"""What passes between the parts; tensors and names, nothing else.

Shapes: `*clients` is empty for one client and `[clients]` for a stack of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Leaves = dict[str, Tensor]
"""An adapter: named tensors, always float32; `[*clients, *shape]` each."""

AVERAGE = "average."
"""Begins the name of a leaf that follows another, by the rest of its name: a moving average."""

RESIDUAL = "residual."
"""Begins the name of a frozen factor beside another, by the rest of its name: what the server adds
to that one's product."""

VARIATE = "variate."
"""Begins the name of what a method's server tells beside a leaf, by the rest of its name."""

PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""Endings of the names of two factors of one product."""

CORE = "lora_R"
"""Ending of the name of what stands between two factors: the product is B R A."""

Batch = dict[str, Tensor]
"""Examples with all that their loss needs; `[*clients, batch, ...]` each."""

Statistics = dict[str, Tensor]
"""Held-out sums that add up over batches and clients; `[*clients]` each."""


@dataclass(frozen=True)
class PerClient:
    """A sum and what it is a sum over."""

    total: Tensor
    """Summed loss (nats where it is a likelihood), `[*clients]`."""
    count: Tensor
    """Tokens or examples in the sum, `[*clients]`."""


class Phase(NamedTuple):
    """A part of an adapter that is trained on its own."""

    prefix: str = ""
    """Leaves whose name begins so; the empty one is all of them."""
    repeats: int = 1
    """Optimiser steps on each batch."""
    rate: float = 1.0
    """Its learning rate, as a multiple of the recipe's."""


@dataclass(frozen=True)
class Order:
    """One learner's work in one round, as the server words it."""

    clients: tuple[int, ...]
    """Whose data it trains on: one client, or all of them where data are pooled."""
    round: int
    """Counted from 0."""
    received: Leaves
    """The global adapter, exactly as it arrived, with what the method tells beside it; rules on
    products add the change to it."""
    payload: bytes = b""
    """What travelled, of which `received` was made."""
    rank: int | None = None
    """Of the learner's adapter: `received` is zero beyond it; none is the global adapter's."""
    strides: Mapping[str, float] = field(default_factory=dict)
    """How far a gradient of one moves leaves with each batch, by the prefix of their phase."""


@dataclass(frozen=True)
class Update:
    """What came back for an order."""

    order: Order
    delta: Leaves
    """The change of the leaves that were sent, as the server decoded it."""
    memory: Leaves
    """What the client keeps; it never travels."""
    weight: float
    """Training examples behind the change."""
    loss: float
    """Mean training loss, nats a token (or per example)."""
    steps: int
    """Optimiser steps taken."""
    bytes_up: int
    """Serialised length of what was sent, metadata included."""
    lost_memory: Leaves = field(default_factory=dict)
    """What the method had the client remember, where it has lost that: it trained without."""
    client_norm: float | None = None
    """Norm of the client's own change where `delta` is the mean over its worker's clients; none
    where it is the client's own."""


class RoundTrip(NamedTuple):
    """A client at work, or done: of a server that has no rounds."""

    client: int
    version: int
    """Commits before the adapter that it was given."""
    end: float
    """Seconds since the start of training."""
    arrives: bool
    bytes_sent: int
    """Bytes that it has sent by its end."""


class Queue(NamedTuple):
    """The virtual time, and who is at work, between two commits."""

    clock: float = 0.0
    """Virtual seconds since the start of training."""
    draws: int = 0
    """How often clients were drawn so far: seeds the next draw."""
    trips: tuple[RoundTrip, ...] = ()
    """In the order in which they began."""


@dataclass(frozen=True)
class ServerState:
    """All that the server needs to go on; `federation.states` writes and reads it."""

    round: int
    """Rounds committed so far."""
    adapter: Leaves
    """The global adapter."""
    first_moment: Leaves = field(default_factory=dict)
    """The server optimizer's running mean (or sum) of changes, by the leaf's name."""
    second_moment: Leaves = field(default_factory=dict)
    """The server optimizer's running mean (or sum) of squared changes, by the leaf's name."""
    method: Leaves = field(default_factory=dict)
    """What the method itself remembers, under names that it alone knows."""
    losses: Tensor | None = None
    """Every client's last training loss, `[clients]`; infinite of a client that never trained.
    None where no cohort is chosen by it."""
    queue: Queue = field(default_factory=Queue)
    """The virtual clock, and which clients are at work."""
    versions: Mapping[int, Leaves] = field(default_factory=dict)
    """Older adapters on which clients are at work, by the commits before them."""


@dataclass(frozen=True)
class Timing:
    """What the virtual clock says of a commit."""

    clock: float
    """Seconds from the start of training to the commit."""
    dropped: tuple[int, ...] = ()
    """Clients that were asked and do not count."""
    bytes_up: int = 0
    """What these had sent by then."""


@dataclass(frozen=True)
class Commit:
    """One round, done: the new state, and what made it."""

    state: ServerState
    updates: Sequence[Update]
    bytes_down: int
    """Serialised length of what was sent to clients."""
    timing: Timing | None = None
    """Where devices are described."""


def settle_nothing(adapter: Leaves) -> Leaves:
    """How a task settles whose leaves are all trained."""
    del adapter
    return {}
