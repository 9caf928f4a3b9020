"""What a simulation's clients do with an order: train in a round, or personalise at the end.

Here is all that a client has and a server does not: its data, and what it remembers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from fedgen_edge import leaves
from fedgen_edge.adapters.ranks import get_rank_shapes, pad_ranks, truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.ifca import (
    CLUSTER_KEY,
    add_cluster_prefix,
    are_clusters_equal,
    select_cluster,
    split_clusters,
)
from fedgen_edge.algorithms.scaffold import compute_strides
from fedgen_edge.compression.wire import Wire, decode_update, encode_update
from fedgen_edge.data.batches import (
    MARKS,
    Budget,
    Shard,
    count_steps,
    interleave,
    make_batches,
    stack,
    subsample_evenly,
)
from fedgen_edge.errors import TrainingError
from fedgen_edge.federation.client import Recipe, choose_adapter, local_update
from fedgen_edge.leaves import select
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import PrecomputableTask, Task
from fedgen_edge.types import VARIATE, Batch, Leaves, Order, Update


@dataclass(frozen=True)
class SentUpdate:
    """What a client sends for an order; and, beside it, what it keeps."""

    order: Order
    payload: bytes
    """The change of the leaves that are shared, as it travels."""
    memory: Leaves
    """Stays at the client, until it is told that its message counts."""
    weight: float
    """Training examples behind the change."""
    loss: float
    """Mean training loss."""
    steps: int
    """Optimiser steps taken."""
    cluster: int | None = None
    """The one of the server's adapters that it trained; none where there is but one."""


class TuningResult(NamedTuple):
    """One client's own adapter."""

    order: Order
    adapter: Leaves
    history: list[float]
    """Validation loss at the start, then after each epoch."""
    chosen: int
    """The epoch that it kept; 0 is the start."""
    share: float | None = None
    """Of what layers put out, the tuned adapter's; none where there was no choice."""
    cluster: int | None = None
    """The one of the server's adapters that it began from; none where there is but one."""


@runtime_checkable
class Job(Protocol):
    """What an engine has clients do; the engine decides who works together, and knows no method."""

    def steps(self, order: Order) -> int:
        """How long the order is."""
        ...

    def get_stack_group(self, order: Order) -> int:
        """Orders of one number may be carried out together."""
        ...

    def __call__(
        self, orders: Sequence[Order], *, stacked: bool
    ) -> list[Update] | list[TuningResult]:
        """Carry out the orders, none longer than the one before it; unstacked: just one."""
        ...


@runtime_checkable
class TrainingJob(Job, Protocol):
    """A round's job."""

    @property
    def wire(self) -> Wire:
        """How leaves travel."""
        ...

    def count_clients(self) -> int:
        """Clients that there are."""
        ...

    def strides(self, round_: int) -> Mapping[str, float]:
        """How far a gradient of one moves leaves with each batch, by the prefix of their phase."""
        ...

    def commit_updates(self, updates: Sequence[Update]) -> None:
        """Told that these count: only now do clients change what they remember."""
        ...


Engine = Callable[[Sequence[Order], Job], Iterator]
"""Has clients do a job; results come in any order, each with its own order in it."""


@dataclass(frozen=True)
class Clients:
    """The clients of a simulation."""

    task: Task
    algorithm: Algorithm
    shards: Sequence[Shard]
    seed: int
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    memory: MutableMapping[int, Leaves] = field(default_factory=dict)
    """What each client has kept; of one that has kept nothing there is no entry."""
    wire: Wire = field(default_factory=Wire)
    """How leaves travel."""

    def start(self, order: Order) -> Leaves:
        """What the order's client begins from: what it received, and what it has kept."""
        adapter = select(order.received, _is_adapter_leaf)
        return self.algorithm.receives(adapter, self.get_memory(order))

    def correction_state(self, order: Order) -> Leaves:
        """What corrections are made of: what the order's client was told, and what it learnt."""
        correction = {k: v for k, v in order.received.items() if not _is_adapter_leaf(k)}
        return {**select(self.get_memory(order), _is_training_state), **correction}

    def choose_clusters(self, orders: Sequence[Order]) -> "Clients":
        """The same, whose clients remember what they choose of what these orders bring them."""
        if self.algorithm.clusters is None:
            return self
        clients = {order.clients[0]: order for order in orders}
        memory = {
            c: self.choose_cluster(c, order.received, self.get_memory(order))
            for c, order in clients.items()
        }
        return replace(self, memory=memory)

    def choose_cluster(self, client: int, adapter: Leaves, memory: Leaves) -> Leaves:
        """The client's memory, with its choice among an adapter's clusters where it has some."""
        settings, cluster_adapters = self.algorithm.clusters, split_clusters(adapter)
        if settings is None or not cluster_adapters:
            return memory
        examples = self.to_device(subsample_evenly(self.shards[client].train, settings.examples))
        candidates = [self.to_device(own) for own in cluster_adapters.values()]
        cluster = (
            0 if are_clusters_equal(adapter) else choose_adapter(self.task, candidates, examples)
        )
        return {**memory, CLUSTER_KEY: torch.tensor(float(cluster))}

    def get_cluster(self, order: Order) -> int | None:
        """The cluster that the order's client remembers; none where it chose none."""
        memory = self.get_memory(order)
        return int(memory[CLUSTER_KEY]) if CLUSTER_KEY in memory else None

    def personal_start(self, order: Order) -> Leaves:
        """What the order's client begins from with its own model."""
        return self.algorithm.get_personal_model(self.start(order), self.get_memory(order))

    def get_memory(self, order: Order) -> Leaves:
        """What the order's client has kept."""
        return self.memory.get(order.clients[0], {})

    def batches(
        self, order: Order, budget: Budget, purpose: str, train: Mapping[int, Batch]
    ) -> Iterator[Batch]:
        """The order's batches, drawn, of its clients' examples."""
        streams = [
            make_batches(train[c], budget, self.seed, purpose, order.round, c)
            for c in order.clients
        ]
        for at, batch in enumerate(interleave(streams)):
            rng = generator(self.seed, purpose, "draw", order.round, order.clients[0], at)
            yield self.task.draw(batch, rng)

    def train(self, orders: Sequence[Order], budget: Budget) -> dict[int, Batch]:
        """Examples of these orders' clients; done ahead what can be, if they are met again."""
        examples = {c: self.shards[c].train for order in orders for c in order.clients}
        total_steps, single_pass_steps = (
            sum(count_steps(own, told) for own in examples.values())
            for told in (budget, Budget(budget.batch))
        )
        precomputed = (
            self.precompute(examples.values()) if total_steps >= 2 * single_pass_steps else None
        )
        return dict(zip(examples, precomputed, strict=True)) if precomputed else examples

    def precompute(self, examples: Iterable[Batch]) -> list[Batch] | None:
        """These examples with the work done that is the same whenever they are met, if any is."""
        return self.task.precompute(examples) if isinstance(self.task, PrecomputableTask) else None

    def steps(self, order: Order, budget: Budget) -> int:
        """Optimiser steps that the order asks for."""
        return sum(count_steps(self.shards[c].train, budget) for c in order.clients)

    def prepare_inputs(
        self,
        orders: Sequence[Order],
        budget: Budget,
        purpose: str,
        *,
        stacked: bool,
        personal: bool = False,
    ) -> tuple[Leaves, Leaves, Iterator[Batch]]:
        """Starts, memories and batches of some orders: one as it is, or many with a first axis.

        Of clients' own models, if the method has any, starts of the shared one take the memories'
        place.
        """
        get_start = self.personal_start if personal else self.start
        get_state = self.start if personal and self.algorithm.beside else self.correction_state
        train = self.train(orders, budget)
        streams = [self.batches(order, budget, purpose, train) for order in orders]
        starts, memories = (
            [self.to_device(of(o)) for o in orders] for of in (get_start, get_state)
        )
        if not stacked:
            return starts[0], memories[0], map(self.move_batch, streams[0])
        stacked_memories = leaves.stack(leaves.fill_missing(memories))
        return leaves.stack(starts), stacked_memories, map(self.move_batch, stack(streams))

    def move_batch(self, batch: Batch) -> Batch:
        """A batch on the device but for its marks, which decide what is done with it.

        An accelerator goes on with the step before meanwhile, and is never asked for anything.
        """
        if self.device.type != "cuda":
            return {k: v if k in MARKS else v.to(self.device) for k, v in batch.items()}
        return {
            k: v if k in MARKS else v.pin_memory().to(self.device, non_blocking=True)
            for k, v in batch.items()
        }

    def to_device(self, values: Leaves) -> Leaves:
        """On the device."""
        return {k: v.to(self.device) for k, v in values.items()}


def _is_training_state(name: str) -> bool:
    """Whether training sees it: what is kept for another purpose has that in its name."""
    return ":" not in name


def _is_adapter_leaf(name: str) -> bool:
    return not name.startswith(VARIATE)


@dataclass(frozen=True)
class Train:
    """Local updates of one round, encoded and decoded as on a network."""

    clients: Clients
    budget: Budget
    recipe: Callable[[int], Recipe]
    """For a round, since learning rates and trained leaves go by it."""

    @property
    def wire(self) -> Wire:
        """How leaves travel."""
        return self.clients.wire

    def steps(self, order: Order) -> int:
        """Optimiser steps."""
        return self.clients.steps(order, self.budget)

    def get_stack_group(self, order: Order) -> int:
        """Steps in an epoch, where it says which leaves are trained."""
        if not self.clients.algorithm.head_epochs:
            return 0
        return self.budget.count_epoch_steps(self.clients.shards[order.clients[0]].train)

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Update]:
        """Train, and return what the server gets; nothing is remembered yet."""
        return [self._decode_update(sent) for sent in self.send(orders, stacked=stacked)]

    def send(self, orders: Sequence[Order], *, stacked: bool) -> list[SentUpdate]:
        """Choose where there is a choice, train, and return what leaves each client."""
        return replace(self, clients=self.clients.choose_clusters(orders))._send(orders, stacked)

    def _send(self, orders: Sequence[Order], stacked: bool) -> list[SentUpdate]:
        inputs = self.clients.prepare_inputs(orders, self.budget, "train", stacked=stacked)
        start, memory, batches = inputs
        recipe = self.recipe(orders[0].round)
        delta, loss = local_update(self.clients.task, start, memory, batches, recipe)
        losses = (loss.total / loss.count.clamp(min=1)).reshape(-1).tolist()
        rows = [{k: v[i] if stacked else v for k, v in delta.items()} for i in range(len(orders))]
        sent_updates = [
            self._encode_update(order, {k: v.cpu() for k, v in own.items()}, mean)
            for order, own, mean in zip(orders, rows, losses, strict=True)
        ]
        return (
            sent_updates
            if self.clients.algorithm.beside is None
            else self._train_personal(sent_updates, stacked)
        )

    def count_clients(self) -> int:
        """Clients that there are."""
        return len(self.clients.shards)

    def strides(self, round_: int) -> Mapping[str, float]:
        """Of this round's recipe."""
        return compute_strides(self.clients.task.phases, self.recipe(round_).rate)

    def commit_updates(self, updates: Sequence[Update]) -> None:
        """Remember what each of these clients kept."""
        for update in updates:
            if update.memory:
                self.clients.memory[update.order.clients[0]] = update.memory

    def _train_personal(self, sent_updates: list[SentUpdate], stacked: bool) -> list[SentUpdate]:
        """The same, and the clients' own models trained and kept."""
        clients, orders = self.clients, [each.order for each in sent_updates]
        beside = clients.algorithm.beside
        assert beside is not None
        start, shared, batches = clients.prepare_inputs(
            orders, self.budget, "train", stacked=stacked, personal=True
        )
        recipe = replace(self.recipe(orders[0].round), corrects=beside.corrects)
        delta, _ = local_update(clients.task, start, shared, batches, recipe)
        trained = {k: v.cpu() for k, v in leaves.add(start, delta).items()}
        rows = [leaves.row(trained, i) if stacked else trained for i in range(len(sent_updates))]
        return [
            replace(one, memory=one.memory | beside.make_memory(row, clients.start(one.order)))
            for one, row in zip(sent_updates, rows, strict=True)
        ]

    def _encode_update(self, order: Order, delta: Leaves, loss: float) -> SentUpdate:
        algorithm, start = self.clients.algorithm, self.clients.start(order)
        steps = self.steps(order)
        memory = self.clients.get_memory(order)
        shared = truncate_rank(algorithm.select_shared(delta, order.round), order.rank)
        cluster = self.clients.get_cluster(order)
        shared = shared if cluster is None else add_cluster_prefix(shared, cluster)
        try:
            payload, residuals = encode_update(
                self.wire, shared, memory, order.round, order.clients[0]
            )
        except TrainingError as error:
            names = "+".join(self.clients.shards[c].name for c in order.clients)
            raise TrainingError(f"round {order.round + 1}, client {names}: {error}") from None
        return SentUpdate(
            order=order,
            payload=payload,
            memory={
                **algorithm.keeps(start, delta, memory),
                **algorithm.learns(order, delta, steps, memory),
                **residuals,
            },
            weight=sum(self.clients.shards[c].weight for c in order.clients),
            loss=loss,
            steps=steps,
            cluster=cluster,
        )

    def _decode_update(self, sent: SentUpdate) -> Update:
        """The server's half: what it makes of a client's message."""
        order = sent.order
        received = select_cluster(order.received, sent.cluster)
        full_shapes = leaves.shapes(self.clients.algorithm.select_shared(received, order.round))
        sent_shapes = get_rank_shapes(full_shapes, order.rank)
        delta = decode_update(self.wire, sent.payload, sent_shapes, order.round, order.clients[0])
        return Update(
            order=order,
            delta=pad_ranks(delta, full_shapes),
            memory=sent.memory,
            weight=sent.weight,
            loss=sent.loss,
            steps=sent.steps,
            bytes_up=len(sent.payload),
        )
