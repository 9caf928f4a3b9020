"""Slots about what is trained, what is shared, and whose data train together."""

import re
from collections.abc import Callable, Sequence

from fedgen_edge.algorithms.factors import pairs
from fedgen_edge.errors import ConfigError
from fedgen_edge.types import AVERAGE, Leaves


def always(name: str, round_: int, epoch: int) -> bool:
    """Train every leaf in every epoch."""
    del name, round_, epoch
    return True


def everything(names: Sequence[str], round_: int | None) -> set[str]:
    """Share every leaf."""
    del round_
    return set(names)


def no_round(round_: int) -> bool:
    """Train in every round."""
    del round_
    return False


def as_it_is(adapter: Leaves) -> Leaves:
    """Begin with the task's adapter."""
    return adapter


def nothing(names: Sequence[str], round_: int | None) -> set[str]:
    """Share no leaf: every client trains alone."""
    del names, round_
    return set()


def is_drawn(name: str) -> bool:
    """Whether a leaf begins at random, where its partner begins at zero: an embedding's B."""
    return name.endswith((".lora_A", ".lora_embedding_B"))


def first_factors(names: Sequence[str], round_: int | None) -> set[str]:
    """Share A, and what is no factor; B stays at the client.

    Source: Guo et al. 2024, FedSA-LoRA (arXiv:2410.01463).
    """
    del round_
    return {*names} - {pair.b for pair in pairs(names)}


def undrawn(name: str, round_: int, epoch: int) -> bool:
    """Train only factors that begin at zero: the mean of products is the product of means.

    Source: Sun et al. 2024, FFA-LoRA (arXiv:2403.12313).
    """
    del round_, epoch
    return not is_drawn(name)


def all_undrawn(names: Sequence[str], round_: int | None) -> set[str]:
    """Share what `undrawn` trains; the rest is where it began, at every client."""
    del round_
    return {name for name in names if not is_drawn(name)}


def in_turn(name: str, round_: int, epoch: int) -> bool:
    """Train the factors that begin at zero, and those drawn at random, in turn; others always.

    Moving averages are among the others: they come nearer to a factor that rests, too.

    Source: Chen et al. 2024, RoLoRA (arXiv:2409.02346): odd rounds, counted from 1, train B.
    """
    del epoch
    factor = name.rpartition(".")[2].startswith("lora_") and not name.startswith(AVERAGE)
    return not factor or is_drawn(name) == bool(round_ % 2)


def all_in_turn(names: Sequence[str], round_: int | None) -> set[str]:
    """Share what `in_turn` trains."""
    return {name for name in names if round_ is None or in_turn(name, round_, 0)}


def all_but_last(layers: int) -> Callable[[Sequence[str], int | None], set[str]]:
    """Share all leaves but those of the last layers.

    A leaf's layer is its name up to the first number (`model.layers.7`, `up_blocks.1`). Layers come
    in the order of their numbers, the way in (an encoder, a UNet's way down) before the middle and
    the way out; leaves without a number, such as an embedding's, are shared. A GAN's critic has
    last layers of its own, and a moving average belongs to the layer that it follows.

    Source: Arivazhagan et al. 2019, FedPer (arXiv:1912.00818), its base layers.
    """

    def sends(names: Sequence[str], round_: int | None) -> set[str]:
        del round_
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
