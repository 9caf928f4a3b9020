"""The catalogue: from the name in a paper's table to an algorithm.

To add a method: a function in its slot's file, a line here (with the laws of its merging, where
they are not FedAvg's), a known-answer test, and a row in docs/methods.md, which a test holds equal
to this table.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

from fedgen_edge.algorithms import (
    bases,
    clusters,
    needs,
    products,
    share,
    stale,
    step,
    unequal,
    variates,
)
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.beside import Beside
from fedgen_edge.algorithms.correct import proximal, towards_shared
from fedgen_edge.algorithms.laws import Laws
from fedgen_edge.algorithms.merge import Summed, by_agreement, by_steps
from fedgen_edge.algorithms.share import all_but_last, all_together, nothing
from fedgen_edge.config import Adapter, Method, Settings
from fedgen_edge.errors import ConfigError
from fedgen_edge.spelling import suggest


class Entry(NamedTuple):
    """A method, and what its row in the catalogue says."""

    about: str
    make: Callable[[Method], Algorithm]
    unequal: bool = False
    """Whether clients' adapters may have different ranks."""
    needs: Callable[[Settings], str | None] = needs.anything
    """Why it cannot work with these settings; none where it can."""
    laws: Laws = Laws()
    """What holds of its merging."""


def _adaptive(second: Callable[[Tensor, Tensor], Tensor], m: Method) -> Algorithm:
    rate = m.server_lr or 0.01
    return Algorithm(steps=step.adaptive(second, rate, m.server_momentum, m.server_floor))


MIXING = (0.0, 0.25, 0.5, 0.75, 1.0)
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
        lambda m: Algorithm(sends=all_but_last(m.personal_layers)),
    ),
    "fedrep": Entry(
        "as fedper, and in each round what stays is trained first (arXiv:2102.07078)",
        lambda m: Algorithm(sends=all_but_last(m.personal_layers), head_epochs=m.head_epochs),
    ),
    "ditto": Entry(
        "each client trains a model of its own, pulled towards the shared one (arXiv:2012.04221)",
        lambda m: Algorithm(beside=Beside(towards_shared(m.own_pull))),
    ),
    "feddpa": Entry(
        "each client trains an adapter of its own with the shared one mixed in (arXiv:2403.19211)",
        lambda m: Algorithm(beside=Beside(share=m.own_share, mixing=MIXING)),
    ),
    "ifca": Entry(
        "several adapters, of which each client trains the one that suits it (arXiv:2006.04088)",
        lambda m: Algorithm(
            begins=clusters.begins(m.clusters),
            receives=clusters.receives,
            merges=clusters.merges,
            clusters=clusters.Clusters(m.clusters, m.choose_by),
        ),
    ),
    "ffa-lora": Entry(
        "A stays as it was drawn, so that the mean is exact (arXiv:2403.12313)",
        lambda _: Algorithm(trains=share.undrawn, sends=share.all_undrawn),
        laws=Laws(splits=True, exact=True),
    ),
    "fedsa-lora": Entry(
        "A is shared, and B stays at the client (arXiv:2410.01463)",
        lambda _: Algorithm(sends=share.first_factors),
    ),
    "rolora": Entry(
        "B and A are trained in turn, a round each, so that means are exact (arXiv:2409.02346)",
        lambda _: Algorithm(trains=share.in_turn, sends=share.all_in_turn),
        laws=Laws(splits=True, exact=True),
    ),
    "flexlora": Entry(
        "the closest adapter to the mean of the clients' products (arXiv:2402.11505)",
        lambda _: Algorithm(merges=products.by_svd),
        unequal=True,
        needs=needs.whole_start,
        laws=Laws(splits=True, sums=False),
    ),
    "hetlora": Entry(
        "clients of any ranks, each layer's mean weighed by the product's size (arXiv:2401.06432)",
        lambda _: Algorithm(merges=unequal.by_norm),
        unequal=True,
        needs=needs.whole_start,
        laws=Laws(halves=False, sums=False),
    ),
    "rbla": Entry(
        "clients of any ranks, each term's mean over those that hold it (arXiv:2408.08699)",
        lambda _: Algorithm(
            merges=unequal.over_holders, summed=Summed(alike=attrgetter("order.rank"))
        ),
        unequal=True,
        needs=needs.whole_start,
    ),
    "raflora": Entry(
        "flexlora for clients of any ranks, each term weighed over its holders (arXiv:2602.13486)",
        lambda _: Algorithm(merges=unequal.by_partitions),
        unequal=True,
        needs=needs.whole_start,
        laws=Laws(splits=True, sums=False),
    ),
    "lora-fair": Entry(
        "mean factors, and B corrected for what their product misses (arXiv:2411.14961)",
        lambda m: Algorithm(merges=products.refined(m.ridge)),
        needs=needs.whole_start,
        laws=Laws(sums=False),
    ),
    "fedex-lora": Entry(
        "mean factors, and what they miss in a frozen pair beside them (arXiv:2410.09432)",
        lambda m: Algorithm(
            merges=products.with_residual(m.residual_rank), residual=m.residual_rank
        ),
        needs=needs.whole_start,
        laws=Laws(splits=True, exact=True, sums=False),
    ),
    "flora": Entry(
        "the clients' products join a frozen pair, and training begins anew (arXiv:2409.05976)",
        lambda m: Algorithm(merges=products.stacked(m.residual_rank), residual=m.residual_rank),
        needs=needs.whole_start,
        laws=Laws(splits=True, exact=True, sums=False),
    ),
    "fed-sb": Entry(
        "an r x r matrix between two bases found first is all that is trained (arXiv:2502.15436)",
        lambda _: Algorithm(
            begins=bases.begins,
            surveys=bases.surveys,
            trains=bases.trains,
            sends=bases.sends,
            merges=bases.merges,
            summed=Summed(),
        ),
        needs=needs.bases,
        laws=Laws(splits=True, exact=True),
    ),
    "fedprox": Entry(
        "each local step is pulled towards the received adapter (arXiv:1812.06127)",
        lambda m: Algorithm(corrects=proximal(m.mu)),
    ),
    "scaffold": Entry(
        "clients' steps are freed of what is their own in the gradient (arXiv:1910.06378)",
        lambda _: Algorithm(
            corrects=variates.corrects,
            tells=variates.tells,
            learns=variates.learns,
            merges=variates.merges,
            summed=Summed(alike=attrgetter("steps"), weight=lambda _: 1.0),
            steps=variates.steps,
        ),
        needs=needs.plain_sgd,
        laws=Laws(halves=False, weighed=False),
    ),
    "fedavgm": Entry(
        "the server adds changes with momentum (arXiv:1909.06335)",
        lambda m: Algorithm(steps=step.momentum(m.server_lr or 1.0, m.server_momentum)),
        laws=Laws(alone=False),
    ),
    "fedadagrad": Entry(
        "the server's step is Adagrad's (arXiv:2003.00295)",
        lambda m: _adaptive(step.adagrad, replace(m, server_momentum=0.0)),
        laws=Laws(alone=False),
    ),
    "fedadam": Entry(
        "the server's step is Adam's (arXiv:2003.00295)",
        lambda m: _adaptive(step.adam(m.server_decay), m),
        laws=Laws(alone=False),
    ),
    "fedyogi": Entry(
        "the server's step is Yogi's (arXiv:2003.00295)",
        lambda m: _adaptive(step.yogi(m.server_decay), m),
        laws=Laws(alone=False),
    ),
    "fednova": Entry(
        "each client's change counts by step, whatever its number of steps (arXiv:2007.07481)",
        lambda _: Algorithm(merges=by_steps, summed=Summed(alike=attrgetter("steps"))),
    ),
    "fedbuff": Entry(
        "a commit for every few updates, whoever sends them, and no rounds (arXiv:2106.06639)",
        lambda m: Algorithm(buffer=m.buffer, ages=stale.by_power(m.staleness)),
        laws=Laws(sums=False),
    ),
    "layerwise": Entry(
        "each layer's mean weighs a client by how well it agrees (after L-DAWA, arXiv:2307.07393)",
        lambda _: Algorithm(merges=by_agreement),
        laws=Laws(sums=False),
    ),
    "local-only": Entry(
        "nothing is shared: every client trains alone",
        lambda _: Algorithm(sends=nothing),
        unequal=True,
    ),
    "centralised": Entry(
        "one learner meets every client's batches: what federation gives up",
        lambda _: Algorithm(groups=all_together),
    ),
}


def method(
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
    if adapter and {*adapter.ranks} - {adapter.rank} and not entry.unequal:
        able = ", ".join(name for name, other in METHODS.items() if other.unequal)
        raise ConfigError(
            f"adapter.ranks={list(adapter.ranks)} cannot go with {setting}={settings.name!r}, "
            f"which merges adapters of one rank: take one of {able}, or leave the ranks out"
        )
    return replace(entry.make(settings), ranks=adapter.ranks if adapter else ())


def check(settings: Settings) -> None:
    """Refuse settings with which the method, or one beside it, cannot work.

    Raises:
        ConfigError: a method is not known, or needs other settings.
    """
    # a run's own settings say stacked, and a baseline that cannot be runs serially beside it
    free = replace(settings, engine=replace(settings.engine, name="auto"))
    beside = [("evaluation.baselines", name, free) for name in settings.evaluation.baselines]
    for setting, name, asked in [("method.name", settings.method.name, settings), *beside]:
        named = replace(settings.method, name=name)
        algorithm = method(named, setting, settings.adapter)
        for need in (*needs.EVERY, _own(name)):
            if reason := need(algorithm, asked):
                raise ConfigError(f"{setting}={name!r} {reason}")


def _own(name: str) -> needs.Need:
    return lambda _, settings: METHODS[name].needs(settings)
