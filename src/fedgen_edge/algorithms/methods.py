"""The catalogue: from the name in a paper's table to an algorithm.

To add a method: a function in its slot's file, a line here (with the laws of its merging, where
they are not FedAvg's), a known-answer test, a row in docs/methods/index.md and a card beside it,
which a test holds equal to this table.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

from fedgen_edge.algorithms import (
    fed_sb,
    ifca,
    merge_mixed_ranks,
    merge_products,
    requirements,
    scaffold,
    server_optimizers,
    share,
    staleness,
)
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.local_corrections import add_proximal_term, pull_toward_shared
from fedgen_edge.algorithms.merge import PartialAggregation, fednova, weigh_by_agreement
from fedgen_edge.algorithms.personal_models import PersonalModel
from fedgen_edge.algorithms.properties import MergeProperties
from fedgen_edge.algorithms.share import pool_clients, share_all_but_last, share_nothing
from fedgen_edge.config import Adapter, Method, Settings
from fedgen_edge.errors import ConfigError, suggest


class Entry(NamedTuple):
    """A method, and what its row in the catalogue says."""

    summary: str
    make: Callable[[Method], Algorithm]
    mixed_ranks: bool = False
    """Whether clients' adapters may have different ranks."""
    find_conflict: Callable[[Settings], str | None] = requirements.find_no_conflict
    """Why it cannot work with these settings; none where it can."""
    properties: MergeProperties = MergeProperties()
    """What holds of its merging."""


def _make_adaptive(second_moment: Callable[[Tensor, Tensor], Tensor], m: Method) -> Algorithm:
    learning_rate = m.server_lr or 0.01
    return Algorithm(
        steps=server_optimizers.adaptive(
            second_moment, learning_rate, m.server_momentum, m.server_floor
        )
    )


MIXING_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of its own adapter that a client of FedDPA chooses from, where the settings name none."""

METHODS: dict[str, Entry] = {
    "fedgen-edge": Entry(
        "FedAvg of LoRA adapters, the backbone frozen (arXiv:2511.11585)", lambda _: Algorithm()
    ),
    "fedavg-full": Entry(
        "FedAvg of every weight (arXiv:1602.05629)", lambda _: Algorithm(adapts="full")
    ),
    "fedper": Entry(
        "the last layers' adapters stay at the client (arXiv:1912.00818)",
        lambda m: Algorithm(sends=share_all_but_last(m.personal_layers)),
    ),
    "fedrep": Entry(
        "as fedper, and in each round what stays is trained first (arXiv:2102.07078)",
        lambda m: Algorithm(sends=share_all_but_last(m.personal_layers), head_epochs=m.head_epochs),
    ),
    "ditto": Entry(
        "each client trains a model of its own, pulled towards the shared one (arXiv:2012.04221)",
        lambda m: Algorithm(beside=PersonalModel(pull_toward_shared(m.ditto_lambda))),
    ),
    "feddpa": Entry(
        "each client trains an adapter of its own with the shared one mixed in (arXiv:2403.19211)",
        lambda m: Algorithm(beside=PersonalModel(share=m.own_share, mixing=MIXING_SHARES)),
    ),
    "ifca": Entry(
        "several adapters, of which each client trains the one that suits it (arXiv:2006.04088)",
        lambda m: Algorithm(
            begins=ifca.begins(m.clusters),
            receives=ifca.receives,
            merges=ifca.merges,
            clusters=ifca.Clusters(m.clusters, m.choose_by),
        ),
    ),
    "ffa-lora": Entry(
        "A stays as it was drawn, so that the mean is exact (arXiv:2403.12313)",
        lambda _: Algorithm(trains=share.train_zero_init, sends=share.share_zero_init),
        properties=MergeProperties(splits=True, exact=True),
    ),
    "fedsa-lora": Entry(
        "A is shared, and B stays at the client (arXiv:2410.01463)",
        lambda _: Algorithm(sends=share.share_all_but_b),
    ),
    "rolora": Entry(
        "B and A are trained in turn, a round each, so that means are exact (arXiv:2409.02346)",
        lambda _: Algorithm(trains=share.train_alternating, sends=share.share_alternating),
        properties=MergeProperties(splits=True, exact=True),
    ),
    "flexlora": Entry(
        "the closest adapter to the mean of the clients' products (arXiv:2402.11505)",
        lambda _: Algorithm(merges=merge_products.flexlora),
        mixed_ranks=True,
        find_conflict=requirements.find_downlink_conflict,
        properties=MergeProperties(splits=True, sums=False),
    ),
    "hetlora": Entry(
        "clients of any ranks, each layer's mean weighed by the product's size (arXiv:2401.06432)",
        lambda _: Algorithm(merges=merge_mixed_ranks.hetlora),
        mixed_ranks=True,
        find_conflict=requirements.find_downlink_conflict,
        properties=MergeProperties(halves=False, sums=False),
    ),
    "rbla": Entry(
        "clients of any ranks, each term's mean over those that hold it (arXiv:2408.08699)",
        lambda _: Algorithm(
            merges=merge_mixed_ranks.rbla,
            summed=PartialAggregation(group_key=attrgetter("order.rank")),
        ),
        mixed_ranks=True,
        find_conflict=requirements.find_downlink_conflict,
    ),
    "raflora": Entry(
        "flexlora for clients of any ranks, each term weighed over its holders (arXiv:2602.13486)",
        lambda _: Algorithm(merges=merge_mixed_ranks.raflora),
        mixed_ranks=True,
        find_conflict=requirements.find_downlink_conflict,
        properties=MergeProperties(splits=True, sums=False),
    ),
    "lora-fair": Entry(
        "mean factors, and B corrected for what their product misses (arXiv:2411.14961)",
        lambda m: Algorithm(merges=merge_products.lora_fair(m.ridge)),
        find_conflict=requirements.find_downlink_conflict,
        properties=MergeProperties(sums=False),
    ),
    "fedex-lora": Entry(
        "mean factors, and what they miss in a frozen pair beside them (arXiv:2410.09432)",
        lambda m: Algorithm(
            merges=merge_products.fedex_lora(m.residual_rank), residual=m.residual_rank
        ),
        find_conflict=requirements.find_downlink_conflict,
        properties=MergeProperties(splits=True, exact=True, sums=False),
    ),
    "flora": Entry(
        "the clients' products join a frozen pair, and training begins anew (arXiv:2409.05976)",
        lambda m: Algorithm(merges=merge_products.flora(m.residual_rank), residual=m.residual_rank),
        find_conflict=requirements.find_downlink_conflict,
        properties=MergeProperties(splits=True, exact=True, sums=False),
    ),
    "fed-sb": Entry(
        "an r x r matrix between two bases found first is all that is trained (arXiv:2502.15436)",
        lambda _: Algorithm(
            begins=fed_sb.begins,
            surveys=fed_sb.surveys,
            trains=fed_sb.trains,
            sends=fed_sb.sends,
            merges=fed_sb.merges,
            summed=PartialAggregation(),
        ),
        find_conflict=requirements.find_bases_conflict,
        properties=MergeProperties(splits=True, exact=True),
    ),
    "fedprox": Entry(
        "each local step is pulled towards the received adapter (arXiv:1812.06127)",
        lambda m: Algorithm(corrects=add_proximal_term(m.mu)),
    ),
    "scaffold": Entry(
        "clients' steps are freed of what is their own in the gradient (arXiv:1910.06378)",
        lambda _: Algorithm(
            corrects=scaffold.corrects,
            tells=scaffold.tells,
            learns=scaffold.learns,
            merges=scaffold.merges,
            summed=PartialAggregation(group_key=attrgetter("steps"), weight=lambda _: 1.0),
            steps=scaffold.steps,
        ),
        find_conflict=requirements.find_sgd_conflict,
        properties=MergeProperties(halves=False, weighed=False),
    ),
    "fedavgm": Entry(
        "the server adds changes with momentum (arXiv:1909.06335)",
        lambda m: Algorithm(
            steps=server_optimizers.momentum(m.server_lr or 1.0, m.server_momentum)
        ),
        properties=MergeProperties(alone=False),
    ),
    "fedadagrad": Entry(
        "the server's step is Adagrad's (arXiv:2003.00295)",
        lambda m: _make_adaptive(server_optimizers.adagrad, replace(m, server_momentum=0.0)),
        properties=MergeProperties(alone=False),
    ),
    "fedadam": Entry(
        "the server's step is Adam's (arXiv:2003.00295)",
        lambda m: _make_adaptive(server_optimizers.adam(m.server_decay), m),
        properties=MergeProperties(alone=False),
    ),
    "fedyogi": Entry(
        "the server's step is Yogi's (arXiv:2003.00295)",
        lambda m: _make_adaptive(server_optimizers.yogi(m.server_decay), m),
        properties=MergeProperties(alone=False),
    ),
    "fednova": Entry(
        "each client's change counts by step, whatever its number of steps (arXiv:2007.07481)",
        lambda _: Algorithm(
            merges=fednova, summed=PartialAggregation(group_key=attrgetter("steps"))
        ),
    ),
    "fedbuff": Entry(
        "a commit for every few updates, whoever sends them, and no rounds (arXiv:2106.06639)",
        lambda m: Algorithm(buffer=m.buffer, ages=staleness.make_polynomial_decay(m.staleness)),
        properties=MergeProperties(sums=False),
    ),
    "layerwise": Entry(
        "each layer's mean weighs a client by how well it agrees (after L-DAWA, arXiv:2307.07393)",
        lambda _: Algorithm(merges=weigh_by_agreement),
        properties=MergeProperties(sums=False),
    ),
    "local-only": Entry(
        "nothing is shared: every client trains alone",
        lambda _: Algorithm(sends=share_nothing),
        mixed_ranks=True,
    ),
    "centralised": Entry(
        "one learner meets every client's batches: what federation gives up",
        lambda _: Algorithm(groups=pool_clients),
    ),
}


def make_algorithm(
    settings: Method, setting: str = "method.name", adapter: Adapter | None = None
) -> Algorithm:
    """The algorithm of these settings.

    Args:
        settings: its name and parameters.
        setting: where the name was given, for the error.
        adapter: the clients' ranks.

    Raises:
        ConfigError: no method has this name, or it cannot merge adapters of these ranks.
    """
    if settings.name not in METHODS:
        hint = suggest(settings.name, METHODS) or f"there are {', '.join(METHODS)}"
        raise ConfigError(f"{setting}={settings.name!r} is not known: {hint}")
    entry = METHODS[settings.name]
    if adapter and {*adapter.ranks} - {adapter.rank} and not entry.mixed_ranks:
        supporting = ", ".join(name for name, other in METHODS.items() if other.mixed_ranks)
        raise ConfigError(
            f"adapter.ranks={list(adapter.ranks)} cannot go with {setting}={settings.name!r}, "
            f"which merges adapters of one rank: take one of {supporting}, or leave the ranks out"
        )
    return replace(entry.make(settings), ranks=adapter.ranks if adapter else ())


def check(settings: Settings) -> None:
    """Refuse settings with which the method, or one beside it, cannot work.

    Raises:
        ConfigError: a method is not known, or needs other settings.
    """
    # a run's own settings say stacked, and a baseline that cannot be runs serially beside it
    unstacked = replace(settings, engine=replace(settings.engine, name="auto"))
    baselines = [
        ("evaluation.baselines", name, unstacked) for name in settings.evaluation.baselines
    ]
    for setting, name, run_settings in [
        ("method.name", settings.method.name, settings),
        *baselines,
    ]:
        method_settings = replace(settings.method, name=name)
        algorithm = make_algorithm(method_settings, setting, settings.adapter)
        for find_conflict in (*requirements.COMMON_REQUIREMENTS, _get_requirement(name)):
            if reason := find_conflict(algorithm, run_settings):
                raise ConfigError(f"{setting}={name!r} {reason}")


def _get_requirement(name: str) -> requirements.Requirement:
    return lambda _, settings: METHODS[name].find_conflict(settings)
