"""Slots that merge many updates into one change."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import torch

from fedgen_edge import leaves
from fedgen_edge.types import AVERAGE, Leaves, Update


def assign_one_group(_update: Update) -> Hashable:
    """One group for all clients."""


class PartialAggregation(NamedTuple):
    """How one mean change can replace many clients' changes, for rules that sum over clients."""

    group_key: Callable[[Update], Hashable] = assign_one_group
    """The key of a group of clients whose mean change replaces the change of each."""
    weight: Callable[[Update], float] = attrgetter("weight")
    """A client's weight in that mean."""


def weighted_average(_adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of the changes, weighted by training examples.

    Source: McMahan et al. 2017, FedAvg (arXiv:1602.05629); for LoRA factors, averaged separately:
    Zhang et al. 2024, FedIT (arXiv:2305.05644), which is FedGen-Edge's rule (arXiv:2511.11585).
    """
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    return leaves.mean([u.delta for u in updates], weights)


def aggregate_partially(updates: Sequence[Update], aggregation: PartialAggregation) -> list[Update]:
    """The updates with each change replaced by its group's mean, which preserves weighted sums.

    So one change per group is enough. The norm of each client's own change is recorded.
    """
    groups: dict[Hashable, list[Update]] = {}
    for update in updates:
        groups.setdefault(aggregation.group_key(update), []).append(update)
    means = {}
    for key, members in groups.items():
        weights = torch.tensor([aggregation.weight(u) for u in members], dtype=torch.float64)
        means[key] = leaves.mean([u.delta for u in members], weights)
    return [
        replace(
            u,
            delta=means[aggregation.group_key(u)],
            client_norm=float(leaves.norm(u.delta)) if u.delta else 0.0,
        )
        for u in updates
    ]


def fednova(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of the changes per step, weighted by examples, times the mean number of steps.

    So a client that takes many steps counts only by its examples. Exact for plain SGD, and a
    heuristic with AdamW. A moving average's change is not a sum over steps, so its mean is used.

    Source: Wang et al. 2020, FedNova (arXiv:2007.07481).
    """
    plain_mean = weighted_average(adapter, updates)
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    steps = torch.tensor([u.steps for u in updates], dtype=torch.float64)
    mean_steps = float((weights * steps).sum() / weights.sum())
    rescaled = [leaves.scale(u.delta, mean_steps / u.steps) for u in updates]
    return {
        k: plain_mean[k] if k.startswith(AVERAGE) else v
        for k, v in leaves.mean(rescaled, weights).items()
    }


def weigh_by_agreement(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of each layer's changes, weighted by examples and by agreement.

    A client's agreement on a layer is the cosine of its change with the cohort's mean change, or
    zero if that is negative; if no client agrees, the plain mean is used. A moving average gets the
    weights of the leaf that it follows.

    Source: Rehman et al. 2023, L-DAWA (arXiv:2307.07393): per-layer weights from angles.
    Differs: their angle is between a client's weights and the global ones, which is meaningless for
    an adapter, whose B starts at zero; and the weights are normalized to sum to one.
    """
    plain_mean = weighted_average(adapter, updates)
    layers: dict[str, list[str]] = {}
    for name in plain_mean:
        layers.setdefault(name.removeprefix(AVERAGE).rpartition(".")[0], []).append(name)
    merged = {}
    for names in layers.values():
        trained_names = [name for name in names if not name.startswith(AVERAGE)]
        mean_change = leaves.flatten(leaves.select(plain_mean, trained_names.__contains__))
        client_changes = [
            leaves.flatten(leaves.select(u.delta, trained_names.__contains__)) for u in updates
        ]
        agreement = torch.stack(
            [torch.cosine_similarity(v, mean_change, dim=0) for v in client_changes]
        ).clamp(min=0)
        weights = torch.tensor([u.weight for u in updates], dtype=torch.float64) * agreement
        members = [leaves.select(u.delta, names.__contains__) for u in updates]
        if weights.sum() > 0:
            merged |= leaves.mean(members, weights)
    return {**plain_mean, **merged}
