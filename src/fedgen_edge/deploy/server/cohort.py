"""Who is asked in a round, of the sites that are there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedgen_edge.config import Federation
from fedgen_edge.federation.schedule import cohort_size
from fedgen_edge.seeds import generator


def count_target_updates(plan: Federation, sites: int) -> int:
    """Updates that a round wants, of so many sites."""
    if plan.cohort is not None:
        return min(plan.cohort, max(1, sites))
    return cohort_size(replace(plan, clients=None), max(1, sites))


def sample_cohort(
    seed: int, round_: int, present: Sequence[str], numbers: Mapping[str, int], count: int
) -> list[int]:
    """So many of the sites that are there, in the order of their numbers.

    Drawn as on one machine: the same shuffle of all, of which those that are away are left out.
    """
    order = torch.randperm(len(numbers), generator=generator(seed, "sample", round_)).tolist()
    present_numbers = {numbers[name] for name in present}
    return sorted([number for number in order if number in present_numbers][:count])
