"""A run from its settings to its models: every step can be stopped at and gone on from."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgen_edge import files, leaves
from fedgen_edge.config import Settings, load, to_toml
from fedgen_edge.errors import CheckpointError, TrainingError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, beside, build, remembering
from fedgen_edge.experiments.checkpoint import Memory, commit, latest
from fedgen_edge.experiments.evaluate import sums, test, tested, validation
from fedgen_edge.experiments.provenance import data_digest, holdings, origin, provenance
from fedgen_edge.jobs import Tuned
from fedgen_edge.rounds import mean_loss, rounds
from fedgen_edge.types import Commit, Leaves, Order, ServerState

CHUNK = 64
"""Clients whose personal adapters are in memory at once."""
SHOWN = 3
"""Clients whose samples the report shows."""


@dataclass(frozen=True)
class Event:
    """Something that a person who waits would like to know."""

    stage: str
    """federation, baselines/NAME, personal, test or samples."""
    done: int
    total: int
    line: dict[str, Any]
    """What was recorded."""


def create(settings: Settings, out: Path) -> Experiment:
    """Build everything, and only then make the run's folder.

    Raises:
        FedGenError: the settings cannot be carried out, or the folder holds something; nothing was
            written.
    """
    if out.exists():
        records.claim(out)
    experiment = build(settings)
    records.claim(out)
    (out / "settings.toml").write_text(to_toml(experiment.settings))
    records.write_json(out / "clients.json", holdings(experiment))
    records.write_json(out / "run.json", provenance(experiment))
    return experiment


def reopen(run: Path) -> Experiment:
    """The experiment of a run's folder, on the same backbone.

    Raises:
        CheckpointError: there is no run, or its backbone has changed since.
    """
    if not (run / "settings.toml").exists() or not (run / "run.json").exists():
        raise CheckpointError(f"{run} holds no run: it has no settings.toml and run.json")
    experiment = build(load(run / "settings.toml"))
    told = records.read_json(run / "run.json")
    _unchanged(run, told, "backbone.sha256", experiment.task.loaded.sha256)
    _unchanged(run, told, "data_sha256", data_digest(experiment))
    return experiment


def _unchanged(run: Path, told: Any, key: str, now: str) -> None:
    """Refuse to go on where a run rests on something else than it began with."""
    for part in key.split("."):
        told = told.get(part) if isinstance(told, dict) else None
    if told != now:
        raise CheckpointError(
            f"{run / 'run.json'}: {key} was {str(told)[:16]}..., and is {now[:16]}... now: "
            "restore what the run began with, or begin another"
        )


def proceed(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Do what is left of a run, from its last commit to its test."""
    with records.locked(run):
        files.sweep(run)
        yield from _federation(experiment, run, "federation")
        for name in experiment.settings.evaluation.baselines:
            stage = f"baselines/{name}"
            yield from _federation(beside(experiment, name), run / stage, stage)
        yield from _personal(experiment, run)
        yield from _test(experiment, run)
        yield from _samples(experiment, run)
        told = records.read_json(run / "run.json")
        records.write_json(run / "run.json", {**told, "seconds": _seconds(run), "finished": True})


def _seconds(run: Path) -> dict[str, Any]:
    """Seconds of each stage, summed over its records: a stop in between does not count."""
    spent = {
        log: sum(line.get("seconds", 0.0) for line in records.lines(run / log))
        for log in ("rounds.jsonl", "personal.jsonl", "evaluation.jsonl")
    }
    baselines = {
        log.parent.name: sum(line["seconds"] for line in records.lines(log))
        for log in sorted(run.glob("baselines/*/rounds.jsonl"))
    }
    return {
        "federation": spent["rounds.jsonl"],
        "baselines": baselines,
        "personal": spent["personal.jsonl"],
        "test": spent["evaluation.jsonl"],
    }


def _federation(experiment: Experiment, folder: Path, stage: str) -> Iterator[Event]:
    """Train to the last round; a line and a commit each."""
    total = experiment.settings.federation.rounds
    for line in federate(experiment, folder):
        yield Event(stage, line["round"], total, line)
    state, _ = _last(folder)
    if experiment.algorithm.sends(list(state.adapter)):
        _save(experiment, folder / "adapters" / "global", state, state.adapter, "global")


def federate(experiment: Experiment, folder: Path) -> Iterator[records.Line]:
    """Train from the last commit on; yields each round's record once it is on the disk.

    The record is written before the commit, and lines after the commit are cut off on the way
    back: so both agree, whenever the run was stopped.

    Raises:
        TrainingError: a loss is not finite; the last commit stands.
    """
    settings = experiment.settings
    state, memory, refused = latest(folder)
    state = state or experiment.start()
    experiment = remembering(experiment, memory)
    log = folder / "rounds.jsonl"
    records.truncate(log, state.round)
    board = records.Board(folder) if settings.evaluation.tensorboard else None
    loop = rounds(
        state,
        experiment.algorithm,
        experiment.engine,
        experiment.train,
        settings.federation,
    )
    for message in refused:
        yield {"round": state.round, "refused": message}
    began, before = time.perf_counter(), state.adapter
    for done in loop:
        trained = time.perf_counter()
        line = _line(experiment, done, before)
        if _judged(settings, done.state.round):
            line["validation"] = validation(experiment, done.state, memory)
        line["seconds"] = round(trained - began, 3)
        line["evaluate_seconds"] = round(time.perf_counter() - trained, 3)
        records.append(log, line)
        commit(folder, done.state, memory, settings.evaluation.keep)
        if board:
            board.write(line)
        yield line
        began, before = time.perf_counter(), done.state.adapter


def _judged(settings: Settings, done: int) -> bool:
    return done % settings.evaluation.every == 0 or done == settings.federation.rounds


def _line(experiment: Experiment, done: Commit, before: Leaves) -> records.Line:
    """What rounds.jsonl says of a round.

    Raises:
        TrainingError: a client's loss is not finite.
    """
    names = experiment.names
    clients = [
        {
            "client": "+".join(names[c] for c in u.order.clients),
            "loss": u.loss,
            "steps": u.steps,
            "weight": u.weight,
            "bytes_up": u.bytes_up,
            "drift": float(leaves.norm(u.delta)) if u.delta else 0.0,
        }
        for u in done.updates
    ]
    for row, update in zip(clients, done.updates, strict=True):
        kept = update.memory.values()
        if not all(map(math.isfinite, (row["loss"], row["drift"], *map(_size, kept)))):
            raise TrainingError(
                f"round {done.state.round}, client {row['client']}: training left the finite "
                f"numbers (its loss was {row['loss']}): "
                f"lower training.lr={experiment.settings.training.lr}, or clip by training.clip"
            )
    change = leaves.norm(leaves.subtract(done.state.adapter, before))
    return {
        "round": done.state.round,
        "cohort": [names[c] for u in done.updates for c in u.order.clients],
        "loss": mean_loss(done.updates),
        "validation": None,
        "bytes_up": sum(u.bytes_up for u in done.updates),
        "bytes_down": done.bytes_down,
        "clients": clients,
        "update_norm": float(change),
    }


def _size(leaf: Tensor) -> float:
    return float(leaf.abs().sum())


def _personal(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Tune every client's own adapter, a chunk at a time; whole chunks are not done again."""
    state, memory = _last(run)
    experiment = remembering(experiment, memory)
    log, total = run / "personal.jsonl", len(experiment.holdings)
    names = records.folder_names(experiment.names)
    done = len(records.lines(log)) // CHUNK * CHUNK
    if len(records.lines(log)) == total:
        return
    records.truncate(log, done)
    for at in range(done, total, CHUNK):
        orders = [
            Order((c,), state.round, state.adapter) for c in range(at, min(at + CHUNK, total))
        ]
        began = time.perf_counter()
        for number, tuned in enumerate(experiment.engine(orders, experiment.tune)):
            line = _own(experiment, run, names, state, tuned)
            line["seconds"] = round(time.perf_counter() - began, 3)
            records.append(log, line)
            yield Event("personal", at + number + 1, total, line)
            began = time.perf_counter()


def _own(
    experiment: Experiment, run: Path, names: dict[str, str], state: ServerState, tuned: Tuned
) -> records.Line:
    """Save a client's own adapter, and judge it."""
    client = tuned.order.clients[0]
    shard = experiment.clients.shards[client]
    target = run / "adapters" / "clients" / names[shard.name]
    _save(experiment, target, state, tuned.adapter, shard.name)
    found = sums(experiment, tuned.adapter, shard.test)
    return {
        "client": shard.name,
        "folder": names[shard.name],
        "validation": tuned.history,
        "chosen": tuned.chosen,
        "test": tested(experiment, "personal", client, found),
    }


def _save(
    experiment: Experiment, target: Path, state: ServerState, adapter: Leaves, client: str
) -> None:
    beside_it = origin(experiment, state, client)
    experiment.task.save(target, adapter, experiment.settings, beside_it)


def _test(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Read the test text, once, under every model."""
    target = run / "evaluation.jsonl"
    if target.exists():
        return
    state, memory = _last(run)
    untouched = ServerState(0, experiment.task.backbone())
    found = list(test(experiment, "backbone", untouched, {}))
    if experiment.algorithm.sends(list(state.adapter)):
        found += list(test(experiment, "global", state, memory))
    for name in experiment.settings.evaluation.baselines:
        found += list(test(beside(experiment, name), name, *_last(run / "baselines" / name)))
    found += [line["test"] for line in records.lines(run / "personal.jsonl")]
    records.write_lines(target, found)
    yield Event("test", 1, 1, {})


def _samples(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Continue the prompts before and after."""
    settings = experiment.settings.evaluation
    target = run / "samples.jsonl"
    if target.exists() or not settings.sample_tokens:
        return
    models = [("backbone", None), ("global", None), *_shown(experiment)]
    found = []
    for done, (model, client) in enumerate(models):
        adapter = model_of(experiment, run, model, client)
        for prompt in settings.prompts:
            seed = experiment.settings.federation.seed
            text = experiment.task.generate(adapter, prompt, settings.sample_tokens, seed)
            found.append({"model": model, "client": client, "prompt": prompt, "text": text})
        yield Event("samples", done + 1, len(models), {})
    records.write_lines(target, found)


def _shown(experiment: Experiment) -> list[tuple[str, str]]:
    return [("personal", name) for name in experiment.names[:SHOWN]]


def model_of(experiment: Experiment, run: Path, model: str, client: str | None) -> Leaves:
    """The leaves of the backbone, the global adapter, or one client's own.

    Raises:
        CheckpointError: the run has no such model (yet).
    """
    if model == "backbone":
        return experiment.task.backbone()
    if client is None:
        return _last(run)[0].adapter
    names = records.folder_names(experiment.names)
    if client not in names:
        raise CheckpointError(f"client {client!r} is not in {run}: {', '.join(names)} are")
    return experiment.task.load(run / "adapters" / "clients" / names[client])


def _last(run: Path) -> tuple[ServerState, Memory]:
    state, memory, _ = latest(run)
    if state is None:
        raise CheckpointError(f"{run} has no checkpoint yet: go on with `fedgen resume {run}`")
    return state, memory


def export(run: Path, out: Path, client: str | None, *, merge: bool) -> list[Path]:
    """Copy adapters out as PEFT folders, or merge one into the backbone.

    Args:
        run: the run's folder.
        out: made here; must not exist yet.
        client: whose; none is the global one, with every client's where nothing is merged.
        merge: write a whole model.

    Returns:
        The folders that were made.
    """
    experiment = reopen(run)
    wanted = [client] if client or merge else [None, *experiment.names]
    models = {who: model_of(experiment, run, "global", who) for who in wanted}
    records.claim(out)
    if merge:
        experiment.task.merged(out, models[client])
        return [out]
    names = records.folder_names(experiment.names)
    state, _ = _last(run)
    targets = {who: out / (f"clients/{names[who]}" if who else "global") for who in models}
    for who, adapter in models.items():
        _save(experiment, targets[who], state, adapter, who or "global")
    return list(targets.values())
