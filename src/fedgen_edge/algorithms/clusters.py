"""IFCA: several adapters at the server, of which each client trains the one that suits its data.

All of them travel down. A client takes the one under which its training examples have the lowest
loss, and sends its change under that one's names; the server adds to each adapter the mean of the
changes that are its own, and leaves as it is what nobody took.

LoRA's B begin at zero, so that all adapters begin as one model, and no loss tells them apart. So
they begin equal, and it is the server that divides the first round's changes, by their angles: the
two that are least alike begin two clusters, a further one begins with the change that is least
like those that began others, and every other change joins the one that it is most like. A round
with fewer clients than clusters divides nothing, and is FedAvg's.

Sources: Ghosh et al. 2020, IFCA (arXiv:2006.04088), algorithm 1 with model averaging; of angles
between changes Sattler et al. 2019 (arXiv:1910.01991).
Differs: their models begin apart, at random, and the first choice is by the loss too; clients count
by their examples, where theirs count alike.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgen_edge import leaves
from fedgen_edge.algorithms.merge import mean
from fedgen_edge.errors import ConfigError
from fedgen_edge.types import Leaves, Update

CHOICE = "chosen:cluster"
"""In a client's memory: the number of the cluster that it took last."""
NAME = re.compile(r"cluster\.(\d+)\.(.+)")
"""A leaf's name at the server: its cluster's number, and the name that it has in training."""
ITSELF = 2.0
"""How like itself a change is: more than a cosine can be."""


@dataclass(frozen=True)
class Clusters:
    """Adapters that clients choose from."""

    number: int
    """At least 2."""
    examples: int
    """Of its training examples, evenly spaced, those by which a client chooses; 0 is all."""


def enough(clusters: Clusters | None, cohort: int) -> None:
    """Refuse rounds with fewer clients than clusters, which would never tell these apart.

    Raises:
        ConfigError: they are fewer.
    """
    if clusters and clusters.number > cohort:
        raise ConfigError(
            f"method.clusters={clusters.number} must be at most {cohort}, the clients of a round: "
            "have fewer, or draw more by federation.cohort"
        )


def begins(number: int) -> Callable[[Leaves], Leaves]:
    """As many equal adapters."""

    def begins(adapter: Leaves) -> Leaves:
        every = [labelled(adapter, cluster) for cluster in range(number)]
        # copies: leaves that share memory cannot be saved
        return {name: leaf.clone() for one in every for name, leaf in one.items()}

    return begins


def labelled(adapter: Leaves, cluster: int) -> Leaves:
    """The leaves under a cluster's names."""
    return {f"cluster.{cluster}.{name}": leaf for name, leaf in adapter.items()}


def parts(adapter: Leaves) -> dict[int, Leaves]:
    """Each cluster's leaves, under the names that they have in training; none of other adapters."""
    found: dict[int, Leaves] = {}
    for name, leaf in adapter.items():
        if told := NAME.fullmatch(name):
            found.setdefault(int(told[1]), {})[told[2]] = leaf
    return dict(sorted(found.items()))


def of(adapter: Leaves, cluster: int | None) -> Leaves:
    """One cluster's leaves alone, under its names (none: all leaves)."""
    return adapter if cluster is None else labelled(parts(adapter)[cluster], cluster)


def plain(delta: Leaves) -> Leaves:
    """What a client sent, under the names that it has in training."""
    return next(iter(parts(delta).values()), delta)


def bare(update: Update) -> Update:
    """The same under the names of training: its cluster's change, and what it began with."""
    if not (own := parts(update.delta)):
        return update
    (cluster,) = own
    received = parts(update.order.received)[cluster]
    return replace(update, order=replace(update.order, received=received), delta=own[cluster])


def alike(adapter: Leaves) -> bool:
    """Whether all clusters are equal, bit for bit."""
    first, *others = parts(adapter).values()
    return all(torch.equal(leaf, first[name]) for own in others for name, leaf in own.items())


def receives(adapter: Leaves, memory: Leaves) -> Leaves:
    """The cluster that the client chose; an adapter without clusters as it is."""
    there = parts(adapter)
    return there[int(memory[CHOICE])] if there else adapter


def taken(adapter: Leaves, updates: Sequence[Update]) -> list[int] | None:
    """Each update's cluster; none where nothing tells them apart, and all are every cluster's.

    Args:
        adapter: the server's, before the round.
        updates: under the names of the clusters that clients chose.
    """
    if not alike(adapter):
        return [next(iter(parts(u.delta))) for u in updates]
    number = len(parts(adapter))
    changes = [leaves.flat(plain(u.delta)) for u in updates]
    return divided(torch.stack(changes), number) if len(changes) >= number else None


def divided(changes: Float[Tensor, "clients values"], number: int) -> list[int]:
    """Which of `number` clusters each change begins, or joins; every cluster has one at least.

    Args:
        changes: no fewer than clusters.
        number: of clusters, at least 2.
    """
    directions = F.normalize(changes, dim=1)
    like = (directions @ directions.mT).fill_diagonal_(ITSELF)
    first = sorted(divmod(int(like.argmin()), len(like)))
    while len(first) < number:
        first.append(int(like[:, first].amax(1).argmin()))
    return like[:, first].argmax(1).tolist()


def merges(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The mean of each cluster's changes, weighted by training examples.

    Raises:
        ValueError: no client has a positive weight.
    """
    if not any(update.weight > 0 for update in updates):
        raise ValueError("a mean needs at least one member with a positive weight")
    # the first of two clusters is the one of the first client, in whatever order updates come
    updates = sorted(updates, key=lambda update: update.order.clients)
    which, found = taken(adapter, updates), {}
    bare = [replace(update, delta=plain(update.delta)) for update in updates]
    for cluster in parts(adapter):
        own = [u for at, u in enumerate(bare) if which is None or which[at] == cluster]
        if any(u.weight > 0 for u in own):
            found |= labelled(mean({}, own), cluster)
    return found
