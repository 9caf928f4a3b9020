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

from fedgen_edge import hardware
from fedgen_edge.adapters.ranks import get_rank_shapes, mask_rank, pad_ranks, truncate_rank
from fedgen_edge.algorithms.ifca import select_cluster
from fedgen_edge.algorithms.methods import check, make_algorithm
from fedgen_edge.compression.serialize import count_encoded_bytes, encode
from fedgen_edge.compression.wire import Wire, decode_broadcast, decode_update, get_max_bytes_down
from fedgen_edge.config import Settings
from fedgen_edge.data import sources
from fedgen_edge.data.partition import split_client
from fedgen_edge.deploy import settings as deployed
from fedgen_edge.deploy.site.store import (
    AnswerFields,
    RequestKey,
    SiteStore,
    StoredUpdate,
    open_store,
)
from fedgen_edge.errors import ConfigError, DataError, RefusedError, TrainingError
from fedgen_edge.federation.jobs import Clients, SentUpdate
from fedgen_edge.leaves import shapes
from fedgen_edge.network.messages import (
    Answer,
    Terms,
    WorkRequest,
    decode_message,
    digest,
    encode_line,
    make_refusal,
)
from fedgen_edge.network.payload import decode_payload
from fedgen_edge.runs.build import (
    Experiment,
    check_held_out,
    check_method,
    make_shards,
    make_task,
    select_drawn_leaves,
    with_image_metadata,
    with_wire,
)
from fedgen_edge.runs.models import save
from fedgen_edge.runs.provenance import holdings, versions
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Order, ServerState

MAX_SITES = 100_000
"""Sites of a federation, at most."""
RUN_PATTERN, SHA256_PATTERN = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Site:
    """A site, its data read and its backbone in memory."""

    experiment: Experiment
    """Of one client, who holds all that is here."""
    recipe: str
    """SHA-256 of the settings that all share."""
    start: Leaves
    """The adapter before the first round: what no server sends begins so."""
    shared_shapes: Mapping[str, tuple[int, ...]]
    """Leaves that travel, and their shapes."""
    state: SiteStore
    correction_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What comes beside them with an order to train, and its shapes."""

    @property
    def name(self) -> str:
        """As the server knows it."""
        return self.experiment.names[0]

    @property
    def max_payload_bytes(self) -> int:
        """Bytes of a payload, at most."""
        return max(
            count_encoded_bytes({**self.shared_shapes, **self.correction_shapes}),
            get_max_bytes_down(self.wire, self.shared_shapes),
        )

    @cached_property
    def drawn_digest(self) -> str:
        """SHA-256 of what this machine drew and no server sends."""
        experiment = self.experiment
        return digest(
            encode(select_drawn_leaves(experiment.settings, experiment.algorithm, self.start))
        )

    @property
    def wire(self) -> Wire:
        """How leaves travel in a round."""
        return self.experiment.clients.wire

    def handle(self, text: str, payload: bytes) -> tuple[str, bytes]:
        """The answer to a message, as a line and a payload: whatever it says, nothing is raised."""
        work = WorkRequest(
            "join", Terms("", self.recipe, self.experiment.task.model.sha256), 0, 0, 0, None
        )
        try:
            work = decode_message(WorkRequest, text, payload)
            self._check(work)
            fields, sent_payload = HANDLERS[work.kind](self, work)
        except RefusedError as error:
            return encode_line(make_refusal(work, error.code, error.reason)), b""
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return encode_line(make_refusal(work, "failed", _describe_error(error))), b""
        base = digest(work.payload)
        return encode_line(
            Answer(work.kind, work.terms, work.round, work.attempt, base, fields)
        ), sent_payload

    def _check(self, work: WorkRequest) -> None:
        """Refuse work that is not for this site, its settings, its backbone and its run."""
        terms, current_run = work.terms, self.state.get_run()
        if (
            not RUN_PATTERN.fullmatch(terms.run)
            or not 0 <= work.client < MAX_SITES
            or work.round < 0
        ):
            raise RefusedError("malformed", "its run, client or round cannot be")
        if work.accepted is not None and not SHA256_PATTERN.fullmatch(work.accepted):
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
        if terms.drawn != self.drawn_digest:
            raise RefusedError(
                "wrong-start",
                f"the leaves drawn here ({versions()}) are not the server's "
                f"({terms.versions[:60]}): install the same versions, or give both one "
                "adapter.initial",
            )
        if work.kind != "join" and terms.run != current_run:
            raise RefusedError("wrong-run", "this site has not joined that run: ask it to join")

    def make_experiment(self, work: WorkRequest) -> Experiment:
        """The experiment as this work finds it: the site's number, and what counts of its past."""
        experiment, number = self.experiment, work.client
        client_state = self.state.get_run_store(work.terms.run).load_client_state(work.accepted)
        if client_state is None:
            print(
                f"round {work.round}: the server counts an update that is not in "
                f"{self.state.folder}: going on as a site that kept nothing",
                file=sys.stderr,
            )
        clients = replace(experiment.clients, shards=[experiment.clients.shards[0]] * (number + 1))
        client_states = {number: client_state} if client_state else {}
        return replace(experiment, clients=clients).with_client_states(client_states)

    def receive_adapter(self, work: WorkRequest, *, with_corrections: bool = False) -> Leaves:
        """The global adapter of some work, with zeros beyond this site's rank.

        With an order to train, what is told beside it too.

        Raises:
            RefusedError: it is not one of this backbone, or of another rank.
        """
        if len(work.payload) > self.max_payload_bytes:
            raise RefusedError(
                "payload-too-long", f"more than the {self.max_payload_bytes} bytes of it"
            )
        schema = (
            {**self.shared_shapes, **self.correction_shapes}
            if with_corrections
            else self.shared_shapes
        )
        return self.complete_adapter(
            decode_payload(work.payload, get_rank_shapes(schema, self.rank(work))), self.rank(work)
        )

    def complete_adapter(self, received_leaves: Leaves, rank: int | None) -> Leaves:
        """The adapter of which these travelled; the rest as it began, zero beyond the rank."""
        return {**mask_rank(self.start, rank), **pad_ranks(received_leaves, self.shared_shapes)}

    def rank(self, work: WorkRequest) -> int | None:
        """By the number that the server gives this site, and the recipe, which all share."""
        return self.experiment.algorithm.get_rank(work.client)

    def make_order(self, work: WorkRequest, strides: Mapping[str, float]) -> Order:
        """A round's work, as it came.

        Raises:
            RefusedError: its payload is not one of this backbone.
        """
        rank = self.rank(work)
        if not self.wire.down.stages:
            adapter = self.receive_adapter(work, with_corrections=True)
        else:
            received_leaves = decode_broadcast(
                self.wire, work.payload, get_rank_shapes(self.shared_shapes, rank)
            )
            adapter = self.complete_adapter(received_leaves, rank)
        return Order((work.client,), work.round, adapter, work.payload, rank=rank, strides=strides)


def is_finite(leaves: Leaves) -> bool:
    """Whether every value is a finite number."""
    return all(bool(v.isfinite().all()) for v in leaves.values())


def _describe_error(error: Exception) -> str:
    """Why work failed, without paths or values of this site where they are not ours to tell."""
    if isinstance(error, OSError):
        reason = error.strerror or ""
    else:
        reason = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else ""
    return f"{type(error).__name__}: {reason[:200]}" if reason else type(error).__name__


def _make_request_key(work: WorkRequest) -> RequestKey:
    return RequestKey(work.round, work.client, digest(work.payload), work.accepted)


def _join(site: Site, work: WorkRequest) -> tuple[AnswerFields, bytes]:
    """Enter the run, and say how much there is to learn from."""
    site.state.join_run(work.terms.run)
    holding_counts = holdings(site.experiment)[0]
    counts = {key: holding_counts[key] for key in ("train", "validation", "test", "items")}
    return {"weight": int(site.experiment.clients.shards[0].weight), **counts}, b""


def _train(site: Site, work: WorkRequest) -> tuple[AnswerFields, bytes]:
    """A round's update, on the disk with what is kept if it counts before it leaves."""
    run_store, key = site.state.get_run_store(work.terms.run), _make_request_key(work)
    if (stored_answer := run_store.find_answer(key)) is not None:
        return stored_answer
    try:
        train = site.make_experiment(work).train
        order = site.make_order(work, train.strides(work.round))
        update = train.send([order], stacked=False)[0]
    except TrainingError as error:
        raise RefusedError("diverged", f"{error}: lower training.lr") from None
    _check_update(site, update)
    fields = {
        "weight": int(update.weight),
        "loss": update.loss,
        "steps": update.steps,
    } | _format_cluster(update.cluster)
    fields |= {"lost": True} if run_store.is_update_missing(work.accepted) else {}
    run_store.save_update(StoredUpdate(key, update.payload, update.memory, fields))
    return fields, update.payload


def _format_cluster(cluster: int | None) -> AnswerFields:
    """Which of the server's adapters the work was done with, where there are several."""
    return {} if cluster is None else {"cluster": cluster}


def _check_update(site: Site, update: SentUpdate) -> None:
    """The last look at what leaves: the shared leaves, of one cluster, and no other, all finite."""
    order = update.order
    round_leaves = site.experiment.algorithm.select_shared(
        select_cluster(site.start, update.cluster), order.round
    )
    # of what was shared when the site opened, whatever the method says by now
    expected = {
        k: shape
        for k, shape in get_rank_shapes(site.shared_shapes, order.rank).items()
        if k in round_leaves
    }
    try:
        delta = decode_update(site.wire, update.payload, expected, order.round, order.clients[0])
    except RefusedError as error:
        message = f"the update is not what these settings make: {error}"
        raise RefusedError("private-leaf", message) from None
    if shapes(delta) != expected:
        raise RefusedError("private-leaf", "the update is not of the shared leaves alone")
    if not math.isfinite(update.loss) or not is_finite(delta) or not is_finite(update.memory):
        raise RefusedError(
            "diverged", "training left the finite numbers: lower training.lr, or set training.clip"
        )


def _evaluate(site: Site, work: WorkRequest) -> tuple[AnswerFields, bytes]:
    """Held-out sums of the site's model as the rounds left it; of the test after the last alone.

    Without a payload, of the backbone as it came.
    """
    experiment = site.make_experiment(work)
    if work.payload:
        state = ServerState(work.round, site.receive_adapter(work))
        model = experiment.get_client_model(
            state, experiment.clients.memory.get(work.client, {}), work.client
        )
    else:
        model = experiment.task.model.get_backbone_leaves()
    shard = experiment.clients.shards[0]
    parts = {"validation": shard.validation}
    if work.round >= experiment.settings.federation.rounds:
        parts["test"] = shard.test
    return {name: experiment.evaluate_client(model, part) for name, part in parts.items()}, b""


def _personalize(site: Site, work: WorkRequest) -> tuple[AnswerFields, bytes]:
    """The site's own adapter, which stays here: only numbers are said of it."""
    run_store, key = site.state.get_run_store(work.terms.run), _make_request_key(work)
    if (stored_fields := run_store.find_tuning(key)) is not None:
        return stored_fields, b""
    started, experiment = time.perf_counter(), site.make_experiment(work)
    adapter = site.receive_adapter(work)
    order = Order((work.client,), work.round, adapter, rank=site.rank(work))
    tuning = experiment.tune([order], stacked=False)[0]
    if not math.isfinite(tuning.history[tuning.chosen]) or not is_finite(tuning.adapter):
        raise RefusedError(
            "diverged",
            "tuning left the finite numbers: lower personal.lr, or say personal.fallback=true",
        )
    run_store.begin_tuning()
    personal_adapter = truncate_rank(tuning.adapter, order.rank)
    save(
        experiment,
        run_store.personal_folder,
        ServerState(work.round, adapter),
        personal_adapter,
        site.name,
    )
    fields = {
        "validation": tuning.history,
        "chosen": tuning.chosen,
        **({} if tuning.share is None else {"share": tuning.share}),
        **_format_cluster(tuning.cluster),
        "test": experiment.evaluate_client(tuning.adapter, experiment.clients.shards[0].test),
        "seconds": round(time.perf_counter() - started, 3),
    }
    run_store.record_tuning(key, fields)
    return fields, b""


HANDLERS: dict[str, Callable[[Site, WorkRequest], tuple[AnswerFields, bytes]]] = {
    "join": _join,
    "train": _train,
    "evaluate": _evaluate,
    "personalise": _personalize,
}


def open_site(folder: Path) -> Site:
    """Read a site's settings and data, and load its backbone.

    Args:
        folder: the site's kit.

    Raises:
        FedGenError: anything in the settings, or in the data, that cannot be carried out.
    """
    site_settings = deployed.read(deployed.SiteSettings, folder / "site.toml")
    settings = deployed.load_site_settings(folder, site_settings)
    recipe = deployed.hash_settings(settings)
    hardware.set_threads(settings.engine.threads)
    experiment = _make_experiment(site_settings.name, settings)
    algorithm, task = experiment.algorithm, experiment.task
    initial_state = algorithm.init(task.init(generator(settings.federation.seed, "init")))
    start = initial_state.adapter
    shared_shapes = shapes(algorithm.select_shared(start))
    if algorithm.buffer:
        raise ConfigError(
            f"method.name={settings.method.name!r} commits by a virtual clock, and a site has "
            "none: take another"
        )
    if not shared_shapes or algorithm.pools_data:
        raise ConfigError(
            f"method.name={settings.method.name!r} has nothing that sites could share: take another"
        )
    correction_shapes = {k: tuple(v.shape) for k, v in algorithm.tells(initial_state, 1).items()}
    return Site(
        experiment, recipe, start, shared_shapes, open_store(folder / "state"), correction_shapes
    )


def _make_experiment(name: str, settings: Settings) -> Experiment:
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
    settings = with_image_metadata(settings, corpus)
    if (count := len(corpus.examples)) < settings.partition.minimum:
        raise DataError(
            f"data.path={settings.data.path!r} has {count} examples, fewer than "
            f"partition.minimum={settings.partition.minimum}: bring more"
        )
    holding = split_client(name, list(range(count)), corpus, settings.data)
    check_held_out([holding])
    device = hardware.device(settings.engine.device)
    task = make_task(settings, device)
    algorithm = make_algorithm(settings.method, adapter=settings.adapter)
    check_method(algorithm, task)
    client_shards = make_shards(task, corpus, [holding], settings)
    clients = Clients(task, algorithm, client_shards, settings.federation.seed, device)
    return with_wire(Experiment(settings, task, corpus, [holding], clients))
