"""What a site does with the server's work: everything but processes and the network.

What it does not do, for whatever reason, it answers too: `refused` has a code, and `said` why.
"""

import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from fedgen_edge import machine
from fedgen_edge.adapters.ranks import cut, of_rank, padded, truncated
from fedgen_edge.algorithms.clusters import of
from fedgen_edge.algorithms.methods import check, method
from fedgen_edge.config import Settings
from fedgen_edge.data import sources
from fedgen_edge.data.partition import hold
from fedgen_edge.deploy import settings as deployed
from fedgen_edge.deploy.store import Asked, Said, State, Trained, open_state
from fedgen_edge.engines.exchange import Answer, Terms, Work, digest, line, read, refusal
from fedgen_edge.engines.payload import opened
from fedgen_edge.errors import ConfigError, DataError, RefusedError, TrainingError
from fedgen_edge.experiments.build import (
    Experiment,
    check_held_out,
    check_method,
    drawn,
    named,
    shards,
    task_of,
    wired,
)
from fedgen_edge.experiments.models import save
from fedgen_edge.experiments.provenance import holdings, versions
from fedgen_edge.jobs import Clients, Sent
from fedgen_edge.leaves import shapes
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Order, ServerState
from fedgen_edge.uplink.transform import encode, length
from fedgen_edge.uplink.wire import Wire, came_down, came_up, most_down

MOST = 100_000
"""Sites of a federation, at most."""
RUN, HASH = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Site:
    """A site, its data read and its backbone in memory."""

    experiment: Experiment
    """Of one client, who holds all that is here."""
    recipe: str
    """SHA-256 of the settings that all share."""
    start: Leaves
    """The adapter before the first round: what no server sends begins so."""
    shared: Mapping[str, tuple[int, ...]]
    """Leaves that travel, and their shapes."""
    state: State
    told: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What comes beside them with an order to train, and its shapes."""

    @property
    def name(self) -> str:
        """As the server knows it."""
        return self.experiment.names[0]

    @property
    def largest(self) -> int:
        """Bytes of a payload, at most."""
        return max(length({**self.shared, **self.told}), most_down(self.wire, self.shared))

    @cached_property
    def drawn(self) -> str:
        """SHA-256 of what this machine drew and no server sends."""
        experiment = self.experiment
        return digest(encode(drawn(experiment.settings, experiment.algorithm, self.start)))

    @property
    def wire(self) -> Wire:
        """How leaves travel in a round."""
        return self.experiment.clients.wire

    def handle(self, text: str, payload: bytes) -> tuple[str, bytes]:
        """The answer to a message, as a line and a payload: whatever it says, nothing is raised."""
        work = Work(
            "join", Terms("", self.recipe, self.experiment.task.model.sha256), 0, 0, 0, None
        )
        try:
            work = read(Work, text, payload)
            self._check(work)
            said, sent = WAYS[work.kind](self, work)
        except RefusedError as error:
            return line(refusal(work, error.code, error.reason)), b""
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return line(refusal(work, "failed", _told(error))), b""
        base = digest(work.payload)
        return line(Answer(work.kind, work.terms, work.round, work.attempt, base, said)), sent

    def _check(self, work: Work) -> None:
        """Refuse work that is not for this site, its settings, its backbone and its run."""
        terms, bound = work.terms, self.state.bound()
        if not RUN.fullmatch(terms.run) or not 0 <= work.client < MOST or work.round < 0:
            raise RefusedError("malformed", "its run, client or round cannot be")
        if work.accepted is not None and not HASH.fullmatch(work.accepted):
            raise RefusedError("malformed", "its accepted payload is no SHA-256")
        if terms.recipe != self.recipe:
            raise RefusedError(
                "wrong-recipe",
                "recipe.toml, or site.toml's own settings, differ from the server's: fetch a new "
                f"kit from it, or its versions: {terms.versions[:60]}; here {versions()}",
            )
        if terms.backbone != self.experiment.task.model.sha256:
            raise RefusedError(
                "wrong-backbone",
                "the weights at backbone.path are not the server's: copy those here",
            )
        if terms.drawn != self.drawn:
            raise RefusedError(
                "wrong-start",
                f"the leaves drawn here ({versions()}) are not the server's "
                f"({terms.versions[:60]}): install the same versions, or give both one "
                "adapter.initial",
            )
        if work.kind != "join" and terms.run != bound:
            raise RefusedError("wrong-run", "this site has not joined that run: ask it to join")

    def at(self, work: Work) -> Experiment:
        """The experiment as this work finds it: the site's number, and what counts of its past."""
        experiment, number = self.experiment, work.client
        remembered = self.state.past(work.terms.run).remembered(work.accepted)
        if remembered is None:
            print(
                f"round {work.round}: the server counts an update that is not in "
                f"{self.state.folder}: going on as a site that kept nothing",
                file=sys.stderr,
            )
        clients = replace(experiment.clients, shards=[experiment.clients.shards[0]] * (number + 1))
        memory = {number: remembered} if remembered else {}
        return replace(experiment, clients=clients).remembering(memory)

    def received(self, work: Work, *, told: bool = False) -> Leaves:
        """The global adapter of some work, with zeros beyond this site's rank.

        With an order to train, what is told beside it too.

        Raises:
            RefusedError: it is not one of this backbone, or of another rank.
        """
        if len(work.payload) > self.largest:
            raise RefusedError("payload-too-long", f"more than the {self.largest} bytes of it")
        schema = {**self.shared, **self.told} if told else self.shared
        return self.whole(opened(work.payload, of_rank(schema, self.rank(work))), self.rank(work))

    def whole(self, found: Leaves, rank: int | None) -> Leaves:
        """The adapter of which these travelled; the rest as it began, zero beyond the rank."""
        return {**cut(self.start, rank), **padded(found, self.shared)}

    def rank(self, work: Work) -> int | None:
        """By the number that the server gives this site, and the recipe, which all share."""
        return self.experiment.algorithm.rank(work.client)

    def ordered(self, work: Work, strides: Mapping[str, float]) -> Order:
        """A round's work, as it came.

        Raises:
            RefusedError: its payload is not one of this backbone.
        """
        rank = self.rank(work)
        if not self.wire.down.stages:
            received = self.received(work, told=True)
        else:
            found = came_down(self.wire, work.payload, of_rank(self.shared, rank))
            received = self.whole(found, rank)
        return Order((work.client,), work.round, received, work.payload, rank=rank, strides=strides)


def finite(found: Leaves) -> bool:
    """Whether every value is a finite number."""
    return all(bool(v.isfinite().all()) for v in found.values())


def _told(error: Exception) -> str:
    """Why work failed, without paths or values of this site where they are not ours to tell."""
    if isinstance(error, OSError):
        why = error.strerror or ""
    else:
        why = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else ""
    return f"{type(error).__name__}: {why[:200]}" if why else type(error).__name__


def _asked(work: Work) -> Asked:
    return Asked(work.round, work.client, digest(work.payload), work.accepted)


def _join(site: Site, work: Work) -> tuple[Said, bytes]:
    """Enter the run, and say how much there is to learn from."""
    site.state.bind(work.terms.run)
    held = holdings(site.experiment)[0]
    told = {key: held[key] for key in ("train", "validation", "test", "items")}
    return {"weight": int(site.experiment.clients.shards[0].weight), **told}, b""


def _train(site: Site, work: Work) -> tuple[Said, bytes]:
    """A round's update, on the disk with what is kept if it counts before it leaves."""
    past, asked = site.state.past(work.terms.run), _asked(work)
    if (found := past.again(asked)) is not None:
        return found
    try:
        train = site.at(work).train
        order = site.ordered(work, train.strides(work.round))
        sent = train.send([order], stacked=False)[0]
    except TrainingError as error:
        raise RefusedError("diverged", f"{error}: lower training.lr") from None
    _check_sent(site, sent)
    said = {"weight": int(sent.weight), "loss": sent.loss, "steps": sent.steps} | _of(sent.cluster)
    said |= {"lost": True} if past.lost(work.accepted) else {}
    past.keep(Trained(asked, sent.payload, sent.memory, said))
    return said, sent.payload


def _of(cluster: int | None) -> Said:
    """Which of the server's adapters the work was done with, where there are several."""
    return {} if cluster is None else {"cluster": cluster}


def _check_sent(site: Site, sent: Sent) -> None:
    """The last look at what leaves: the shared leaves, of one cluster, and no other, all finite."""
    order = sent.order
    now = site.experiment.algorithm.shared(of(site.start, sent.cluster), order.round)
    # of what was shared when the site opened, whatever the method says by now
    expected = {k: shape for k, shape in of_rank(site.shared, order.rank).items() if k in now}
    try:
        delta = came_up(site.wire, sent.payload, expected, order.round, order.clients[0])
    except RefusedError as error:
        told = f"the update is not what these settings make: {error}"
        raise RefusedError("private-leaf", told) from None
    if shapes(delta) != expected:
        raise RefusedError("private-leaf", "the update is not of the shared leaves alone")
    if not math.isfinite(sent.loss) or not finite(delta) or not finite(sent.memory):
        raise RefusedError(
            "diverged", "training left the finite numbers: lower training.lr, or set training.clip"
        )


def _evaluate(site: Site, work: Work) -> tuple[Said, bytes]:
    """Held-out sums of the site's model as the rounds left it; of the test after the last alone.

    Without a payload, of the backbone as it came.
    """
    experiment = site.at(work)
    if work.payload:
        state = ServerState(work.round, site.received(work))
        own = experiment.own(state, experiment.clients.memory.get(work.client, {}), work.client)
    else:
        own = experiment.task.model.backbone()
    shard = experiment.clients.shards[0]
    parts = {"validation": shard.validation}
    if work.round >= experiment.settings.federation.rounds:
        parts["test"] = shard.test
    return {name: experiment.sums(own, part) for name, part in parts.items()}, b""


def _personalise(site: Site, work: Work) -> tuple[Said, bytes]:
    """The site's own adapter, which stays here: only numbers are said of it."""
    past, asked = site.state.past(work.terms.run), _asked(work)
    if (found := past.tuned_again(asked)) is not None:
        return found, b""
    began, experiment = time.perf_counter(), site.at(work)
    received = site.received(work)
    order = Order((work.client,), work.round, received, rank=site.rank(work))
    tuned = experiment.tune([order], stacked=False)[0]
    if not math.isfinite(tuned.history[tuned.chosen]) or not finite(tuned.adapter):
        raise RefusedError(
            "diverged",
            "tuning left the finite numbers: lower personal.lr, or say personal.fallback=true",
        )
    past.begin_tuning()
    own = truncated(tuned.adapter, order.rank)
    save(experiment, past.personal, ServerState(work.round, received), own, site.name)
    said = {
        "validation": tuned.history,
        "chosen": tuned.chosen,
        **({} if tuned.share is None else {"share": tuned.share}),
        **_of(tuned.cluster),
        "test": experiment.sums(tuned.adapter, experiment.clients.shards[0].test),
        "seconds": round(time.perf_counter() - began, 3),
    }
    past.tuned(asked, said)
    return said, b""


WAYS: dict[str, Callable[[Site, Work], tuple[Said, bytes]]] = {
    "join": _join,
    "train": _train,
    "evaluate": _evaluate,
    "personalise": _personalise,
}


def open_site(folder: Path) -> Site:
    """Read a site's settings and data, and load its backbone.

    Args:
        folder: the site's kit.

    Raises:
        FedGenError: anything in the settings, or in the data, that cannot be carried out.
    """
    told = deployed.read(deployed.Site, folder / "site.toml")
    settings = deployed.settings_of(folder, told)
    recipe = deployed.digest(settings)
    machine.set_threads(settings.engine.threads)
    experiment = _alone(told.name, settings)
    algorithm, task = experiment.algorithm, experiment.task
    begun = algorithm.init(task.init(generator(settings.federation.seed, "init")))
    start = begun.adapter
    shared = shapes(algorithm.shared(start))
    if algorithm.buffer:
        raise ConfigError(
            f"method.name={settings.method.name!r} commits by a virtual clock, and a site has "
            "none: take another"
        )
    if not shared or algorithm.pools:
        raise ConfigError(
            f"method.name={settings.method.name!r} has nothing that sites could share: take another"
        )
    beside = {k: tuple(v.shape) for k, v in algorithm.tells(begun, 1).items()}
    return Site(experiment, recipe, start, shared, open_state(folder / "state"), beside)


def _alone(name: str, settings: Settings) -> Experiment:
    """An experiment whose one client holds all that is here.

    Topics are not sought: they divide data among clients, and here is but one.
    """
    if settings.data.source == "images" and not settings.data.names:
        raise ConfigError(
            "data.names=() would number classes by the folders of each site: name them in "
            "recipe.toml, for all sites alike"
        )
    check(settings)
    corpus = sources.read(settings.data)
    settings = named(settings, corpus)
    if (count := len(corpus.examples)) < settings.partition.minimum:
        raise DataError(
            f"data.path={settings.data.path!r} has {count} examples, fewer than "
            f"partition.minimum={settings.partition.minimum}: bring more"
        )
    holding = hold(name, list(range(count)), corpus, settings.data)
    check_held_out([holding])
    device = machine.device(settings.engine.device)
    task = task_of(settings, device)
    algorithm = method(settings.method, adapter=settings.adapter)
    check_method(algorithm, task)
    own = shards(task, corpus, [holding], settings)
    clients = Clients(task, algorithm, own, settings.federation.seed, device)
    return wired(Experiment(settings, task, corpus, [holding], clients))
