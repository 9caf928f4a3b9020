"""Slots about what is trained, what is shared, and whose data train together."""

import re
from collections.abc import Callable, Sequence

from fedgen_edge.errors import ConfigError
from fedgen_edge.types import AVERAGE


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

    A leaf's layer is its name up to the first number (`model.layers.7`, `up_blocks.1`). Layers come
    in the order of their numbers, the way in (an encoder, a UNet's way down) before the middle and
    the way out; leaves without a number, such as an embedding's, are shared. A GAN's critic has
    last layers of its own, and a moving average belongs to the layer that it follows.

    Source: Arivazhagan et al. 2019, FedPer (arXiv:1912.00818), its base layers.
    """

    def sends(names: Sequence[str]) -> set[str]:
        plain = {n: n.removeprefix(AVERAGE) for n in names}
        layer = {n: m[0] for n in names if (m := re.match(r".*?\.\d+(?=\.)", plain[n]))}
        there = sorted(set(layer.values()), key=_depth)
        critic = [own for own in there if own.startswith("critic.")]
        networks = [critic, [own for own in there if own not in critic]]
        fewest = min(len(network) for network in networks if network or network is not critic)
        if layers >= fewest:
            raise ConfigError(
                f"method.personal_layers={layers} must be below {fewest}, the layers that are "
                "adapted: else nothing would be shared"
            )
        kept = [own for network in networks for own in network[-layers:]]
        return {n for n in names if layer.get(n) not in kept}

    return sends


def _depth(layer: str) -> tuple[int, str, int]:
    """Where a layer comes, whatever the order of names is."""
    network, _, number = layer.rpartition(".")
    way = 0 if re.match("encoder|down", network) else 1 if network.startswith("mid") else 2
    return way, network, int(number)


def each_alone(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """A learner for every client."""
    return [(client,) for client in cohort]


def all_together(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """One learner for the whole cohort's data: what could be learnt were they pooled."""
    return [tuple(cohort)]
