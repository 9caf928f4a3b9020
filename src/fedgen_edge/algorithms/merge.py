"""Slots that make one change of many updates."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import torch

from fedgen_edge import leaves
from fedgen_edge.types import AVERAGE, Leaves, Update


def assign_one_group(update: Update) -> Hashable:
    """Every client is like every other."""
    del update


class PartialAggregation(NamedTuple):
    """How one change stands for those of many clients, in a rule that is a sum over them."""

    group_key: Callable[[Update], Hashable] = assign_one_group
    """What clients have in common whose mean stands for each of them."""
    weight: Callable[[Update], float] = attrgetter("weight")
    """What each counts in that mean."""


def weighted_average(adapter: Leaves, updates: Sequence[Update]) -> Leaves:
    """Mean of the changes, weighted by training examples.

    Source: McMahan et al. 2017, FedAvg (arXiv:1602.05629); of LoRA factors, each on its own:
    Zhang et al. 2024, FedIT (arXiv:2305.05644), which is FedGen-Edge's rule (arXiv:2511.11585).
    """
    del adapter
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    return leaves.mean([u.delta for u in updates], weights)


def aggregate_partially(updates: Sequence[Update], aggregation: PartialAggregation) -> list[Update]:
    """The same, each with the mean of those alike in its own change's place: sums are the same.

    So of many clients one change is enough, whoever else there is. What each moved by is noted.
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
    """Mean of the changes a step, weighted by examples, times the mean number of steps.

    So a client that takes many steps pulls no harder than its examples say. Exact for plain SGD,
    and a heuristic under AdamW. A moving average's change is no sum over steps: its mean stands.

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

    A client's agreement on a layer is the cosine of its change of the layer with the cohort's mean
    change of it, and none where that is negative; where nobody agrees, the mean stands. A moving
    average is weighed as what it follows.

    Source: Rehman et al. 2023, L-DAWA (arXiv:2307.07393): weights a layer, by angles.
    Differs: their angle is between a client's weights and the global ones, which says nothing of an
    adapter, whose B begins at zero; and the weights are made to sum to one.
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
