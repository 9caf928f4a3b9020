"""Slots that make one change of many updates."""

from collections.abc import Sequence

import torch

from fedgen_edge import leaves
from fedgen_edge.types import Leaves, Update


def mean(updates: Sequence[Update]) -> Leaves:
    """Mean of the changes, weighted by training examples.

    Source: McMahan et al. 2017, FedAvg (arXiv:1602.05629); of LoRA factors, each on its own:
    Zhang et al. 2024, FedIT (arXiv:2305.05644), which is FedGen-Edge's rule (arXiv:2511.11585).
    """
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    return leaves.mean([u.delta for u in updates], weights)
