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
from fedgen_edge.algorithms.merge import weighted_average
from fedgen_edge.errors import ConfigError
from fedgen_edge.types import Leaves, Update

CLUSTER_KEY = "chosen:cluster"
"""In a client's memory: the number of the cluster that it took last."""
CLUSTER_NAME = re.compile(r"cluster\.(\d+)\.(.+)")
"""A leaf's name at the server: its cluster's number, and the name that it has in training."""
SELF_SIMILARITY = 2.0
"""How like itself a change is: more than a cosine can be."""


@dataclass(frozen=True)
class Clusters:
    """Adapters that clients choose from."""

    number: int
    """At least 2."""
    examples: int
    """Of its training examples, evenly spaced, those by which a client chooses; 0 is all."""


def check_cohort_size(clusters: Clusters | None, cohort: int) -> None:
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
        adapters = [add_cluster_prefix(adapter, cluster) for cluster in range(number)]
        # copies: leaves that share memory cannot be saved
        return {name: leaf.clone() for one in adapters for name, leaf in one.items()}

    return begins


def add_cluster_prefix(adapter: Leaves, cluster: int) -> Leaves:
    """The leaves under a cluster's names."""
    return {f"cluster.{cluster}.{name}": leaf for name, leaf in adapter.items()}


def split_clusters(adapter: Leaves) -> dict[int, Leaves]:
    """Each cluster's leaves, under the names that they have in training; none of other adapters."""
    by_cluster: dict[int, Leaves] = {}
    for name, leaf in adapter.items():
        if match := CLUSTER_NAME.fullmatch(name):
            by_cluster.setdefault(int(match[1]), {})[match[2]] = leaf
    return dict(sorted(by_cluster.items()))


def select_cluster(adapter: Leaves, cluster: int | None) -> Leaves:
    """One cluster's leaves alone, under its names (none: all leaves)."""
    return (
        adapter
        if cluster is None
        else add_cluster_prefix(split_clusters(adapter)[cluster], cluster)
    )


def strip_cluster_prefix(delta: Leaves) -> Leaves:
    """What a client sent, under the names that it has in training."""
    return next(iter(split_clusters(delta).values()), delta)


def strip_update_prefix(update: Update) -> Update:
    """The same under the names of training: its cluster's change, and what it began with."""
    if not (by_cluster := split_clusters(update.delta)):
        return update
    (cluster,) = by_cluster
    received = split_clusters(update.order.received)[cluster]
    return replace(
        update, order=replace(update.order, received=received), delta=by_cluster[cluster]
    )


def are_clusters_equal(adapter: Leaves) -> bool:
    """Whether all clusters are equal, bit for bit."""
    first, *others = split_clusters(adapter).values()
    return all(torch.equal(leaf, first[name]) for other in others for name, leaf in other.items())


def receives(adapter: Leaves, memory: Leaves) -> Leaves:
    """The cluster that the client chose; an adapter without clusters as it is."""
    by_cluster = split_clusters(adapter)
    return by_cluster[int(memory[CLUSTER_KEY])] if by_cluster else adapter


def assign_clusters(adapter: Leaves, updates: Sequence[Update]) -> list[int] | None:
    """Each update's cluster; none where nothing tells them apart, and all are every cluster's.

    Args:
        adapter: the server's, before the round.
        updates: under the names of the clusters that clients chose.
    """
    if not are_clusters_equal(adapter):
        return [next(iter(split_clusters(u.delta))) for u in updates]
    number = len(split_clusters(adapter))
    changes = [leaves.flatten(strip_cluster_prefix(u.delta)) for u in updates]
    return divide_by_angle(torch.stack(changes), number) if len(changes) >= number else None


def divide_by_angle(changes: Float[Tensor, "clients values"], number: int) -> list[int]:
    """Which of `number` clusters each change begins, or joins; every cluster has one at least.

    Args:
        changes: no fewer than clusters.
        number: of clusters, at least 2.
    """
    directions = F.normalize(changes, dim=1)
    similarity = (directions @ directions.mT).fill_diagonal_(SELF_SIMILARITY)
    founders = sorted(divmod(int(similarity.argmin()), len(similarity)))
    while len(founders) < number:
        founders.append(int(similarity[:, founders].amax(1).argmin()))
    return similarity[:, founders].argmax(1).tolist()


def merges(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """The mean of each cluster's changes, weighted by training examples.

    Raises:
        ValueError: no client has a positive weight.
    """
    if not any(update.weight > 0 for update in updates):
        raise ValueError("a mean needs at least one member with a positive weight")
    # the first of two clusters is the one of the first client, in whatever order updates come
    updates = sorted(updates, key=lambda update: update.order.clients)
    assignment, change = assign_clusters(adapter, updates), {}
    plain_updates = [
        replace(update, delta=strip_cluster_prefix(update.delta)) for update in updates
    ]
    for cluster in split_clusters(adapter):
        members = [
            u
            for at, u in enumerate(plain_updates)
            if assignment is None or assignment[at] == cluster
        ]
        if any(u.weight > 0 for u in members):
            change |= add_cluster_prefix(weighted_average({}, members), cluster)
    return change
