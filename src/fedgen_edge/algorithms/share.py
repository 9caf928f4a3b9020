"""Slots about what is trained, what is shared, and whose data train together."""

import re
from collections.abc import Callable, Sequence

from fedgen_edge.errors import ConfigError


def always(name: str, round_: int, epoch: int) -> bool:
    """Train every leaf in every epoch."""
    del name, round_, epoch
    return True


def everything(names: Sequence[str]) -> set[str]:
    """Share every leaf."""
    return set(names)


def nothing(names: Sequence[str]) -> set[str]:
    """Share no leaf: every client trains alone."""
    del names
    return set()


def all_but_last(layers: int) -> Callable[[Sequence[str]], set[str]]:
    """Share all leaves but those of the last layers.

    A leaf's layer is its name up to the first number (`model.layers.7`, `up_blocks.1`), and layers
    come in the order of their leaves, a UNet's way up at the end; leaves without a number, such as
    an embedding's, are shared.

    Source: Arivazhagan et al. 2019, FedPer (arXiv:1912.00818), its base layers.
    """

    def sends(names: Sequence[str]) -> set[str]:
        layer = {n: m[0] for n in names if (m := re.match(r".*?\.\d+(?=\.)", n))}
        there = sorted(dict.fromkeys(layer.values()), key=lambda own: own.startswith("up_blocks"))
        if layers >= len(there):
            raise ConfigError(
                f"method.personal_layers={layers} must be below {len(there)}, the layers that are "
                "adapted: else nothing would be shared"
            )
        return {n for n in names if layer.get(n) not in there[-layers:]}

    return sends


def each_alone(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """A learner for every client."""
    return [(client,) for client in cohort]


def all_together(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """One learner for the whole cohort's data: what could be learnt were they pooled."""
    return [tuple(cohort)]
