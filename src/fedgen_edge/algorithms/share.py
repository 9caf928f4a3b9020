"""Slots that choose which leaves are trained, which are shared, and whose data train together."""

import re
from collections.abc import Callable, Sequence

from fedgen_edge.algorithms.low_rank import find_pairs
from fedgen_edge.errors import ConfigError
from fedgen_edge.types import AVERAGE, Leaves


def train_all(_name: str, _round: int, _epoch: int) -> bool:
    """Train every leaf in every epoch."""
    return True


def share_all(names: Sequence[str], _round: int | None) -> set[str]:
    """Share every leaf."""
    return set(names)


def never_survey(_round: int) -> bool:
    """Train in every round."""
    return False


def keep_adapter(adapter: Leaves) -> Leaves:
    """Start with the task's adapter."""
    return adapter


def share_nothing(_names: Sequence[str], _round: int | None) -> set[str]:
    """Share no leaf: every client trains alone."""
    return set()


def is_random_init(name: str) -> bool:
    """Whether a leaf is the randomly initialized factor: A, or an embedding's B."""
    return name.endswith((".lora_A", ".lora_embedding_B"))


def share_all_but_b(names: Sequence[str], _round: int | None) -> set[str]:
    """Share A and all leaves that are not factors; B stays at the client.

    Source: Guo et al. 2024, FedSA-LoRA (arXiv:2410.01463).
    """
    return {*names} - {pair.b for pair in find_pairs(names)}


def train_zero_init(name: str, _round: int, _epoch: int) -> bool:
    """Train only factors that start at zero: the mean of products is the product of means.

    Source: Sun et al. 2024, FFA-LoRA (arXiv:2403.12313).
    """
    return not is_random_init(name)


def share_zero_init(names: Sequence[str], _round: int | None) -> set[str]:
    """Share what `train_zero_init` trains; other leaves keep their start at every client."""
    return {name for name in names if not is_random_init(name)}


def train_alternating(name: str, round_: int, _epoch: int) -> bool:
    """Train the zero-initialized and the random factors in alternate rounds; others always.

    The others include moving averages, which also approach a factor that is not being trained.

    Source: Chen et al. 2024, RoLoRA (arXiv:2409.02346): odd rounds, counted from 1, train B.
    """
    is_factor = name.rpartition(".")[2].startswith("lora_") and not name.startswith(AVERAGE)
    return not is_factor or is_random_init(name) == bool(round_ % 2)


def share_alternating(names: Sequence[str], round_: int | None) -> set[str]:
    """Share what `train_alternating` trains."""
    return {name for name in names if round_ is None or train_alternating(name, round_, 0)}


def share_all_but_last(num_layers: int) -> Callable[[Sequence[str], int | None], set[str]]:
    """Share all leaves except those of the last layers.

    A leaf's layer is its name up to the first number (`model.layers.7`, `up_blocks.1`). Layers are
    ordered by number, with the encoder (a UNet's down blocks) before the middle and the decoder;
    leaves without a number, such as an embedding's, are shared. A GAN's critic has its own last
    layers, and a moving average belongs to the layer that it follows.

    Source: Arivazhagan et al. 2019, FedPer (arXiv:1912.00818), its base layers.
    """

    def sends(names: Sequence[str], _round: int | None) -> set[str]:
        plain_names = {n: n.removeprefix(AVERAGE) for n in names}
        layer_of = {n: m[0] for n in names if (m := re.match(r".*?\.\d+(?=\.)", plain_names[n]))}
        layer_names = sorted(set(layer_of.values()), key=_get_layer_order)
        critic = [name for name in layer_names if name.startswith("critic.")]
        networks = [critic, [own for own in layer_names if own not in critic]]
        fewest = min(len(network) for network in networks if network or network is not critic)
        if num_layers >= fewest:
            raise ConfigError(
                f"method.personal_layers={num_layers} must be below {fewest}, the layers that are "
                "adapted: else nothing would be shared"
            )
        personal_layers = [own for network in networks for own in network[-num_layers:]]
        return {n for n in names if layer_of.get(n) not in personal_layers}

    return sends


def _get_layer_order(layer: str) -> tuple[int, str, int]:
    """A layer's sort key, independent of the order of names."""
    network, _, number = layer.rpartition(".")
    stage = 0 if re.match("encoder|down", network) else 1 if network.startswith("mid") else 2
    return stage, network, int(number)


def separate_clients(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """One learner per client."""
    return [(client,) for client in cohort]


def pool_clients(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """One learner on the entire cohort's pooled data: what pooling could achieve."""
    return [tuple(cohort)]
