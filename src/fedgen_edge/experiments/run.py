"""A run from its settings to its models: every step can be stopped at and gone on from."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

from fedgen_edge import files
from fedgen_edge.adapters.ranks import cut, truncated
from fedgen_edge.config import Settings, to_toml
from fedgen_edge.errors import TrainingError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Experiment, beside, build
from fedgen_edge.experiments.checkpoint import last
from fedgen_edge.experiments.evaluate import (
    left,
    models,
    test,
    tested,
)
from fedgen_edge.experiments.federate import federate
from fedgen_edge.experiments.judge import judge, judged
from fedgen_edge.experiments.models import folder_of, record_changes, save
from fedgen_edge.experiments.provenance import Made, holdings, provenance
from fedgen_edge.jobs import Tuned
from fedgen_edge.machine import give_back, peak_memory
from fedgen_edge.tasks.pictures import png
from fedgen_edge.types import Order, ServerState

CHUNK = 64
"""Most clients whose personal adapters are in memory at once; a larger stack is a chunk."""
SHOWN = 3
"""Clients whose samples the report shows."""


@dataclass(frozen=True)
class Event:
    """Something that a person who waits would like to know."""

    stage: str
    """federation, baselines/NAME, personal, test, distances or samples."""
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
    try:
        experiment.task.model.check_peft(experiment.settings)
        held, facts = holdings(experiment), provenance(experiment)
        records.claim(out)
        files.write(out / "settings.toml", to_toml(experiment.settings).encode())
        records.write_json(out / "clients.json", held)
        records.write_json(out / "run.json", facts)
    except BaseException:  # workers must not outlive a run that was never made
        experiment.close()
        raise
    return experiment


def proceed(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Do what is left of a run, from its last commit to its test."""
    with records.locked(run):
        files.sweep(run)
        record_changes(run)
        with closing(experiment):
            for stage in _stages(experiment, run):
                yield from stage
                give_back()
        told = records.read_json(run / "run.json")
        peak = max(peak_memory(), told.get("peak_bytes", 0))
        found = {"seconds": spent(run), "peak_bytes": peak, "finished": True}
        records.write_json(run / "run.json", {**told, **found})


def _stages(experiment: Experiment, run: Path) -> Iterator[Iterator[Event]]:
    yield _federation(experiment, run, "federation")
    for name in experiment.settings.evaluation.baselines:
        stage = f"baselines/{name}"
        yield _federation(beside(experiment, name), run / stage, stage)
    if experiment.has_own:
        yield _personal(experiment, run)
    yield _test(experiment, run)
    yield _judge(experiment, run)
    yield _samples(experiment, run)


def spent(run: Path) -> dict[str, Any]:
    """Seconds of each stage, summed over its records: a stop in between does not count."""
    spent = {
        log: sum(line.get("seconds", 0.0) for line in records.each(run / log))
        for log in ("rounds.jsonl", "personal.jsonl", "evaluation.jsonl", "distances.jsonl")
    }
    baselines = {
        log.parent.name: sum(line.get("seconds", 0.0) for line in records.each(log))
        for log in sorted(run.glob("baselines/*/rounds.jsonl"))
    }
    return {
        "federation": spent["rounds.jsonl"],
        "baselines": baselines,
        "personal": spent["personal.jsonl"],
        "test": spent["evaluation.jsonl"],
        "distances": spent["distances.jsonl"],
    }


def _federation(experiment: Experiment, folder: Path, stage: str) -> Iterator[Event]:
    """Train to the last round; a line and a commit each."""
    total = experiment.settings.federation.rounds
    for line in federate(experiment, folder):
        yield Event(stage, line["round"], total, line)
    state, _ = last(folder)
    for name, adapter in experiment.shared(state).items():
        save(experiment, folder / "adapters" / name, state, adapter, name)
        experiment.task.model.check_written(folder / "adapters" / name, adapter)


def _personal(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Tune every client's own adapter, a chunk at a time; whole chunks are not done again."""
    state, memory = last(run)
    experiment = experiment.remembering(memory)
    log, total = run / "personal.jsonl", len(experiment.holdings)
    names = records.folder_names(experiment.names)
    there = [line["client"] for line in records.each(log)]
    if len(there) == total:
        return
    chunk = whole_stacks(experiment.settings.engine.stack or 1)
    # lines of a chunk are in the order of its stacks, and another stack size has other chunks
    whole = (at for at in range(len(there) // chunk * chunk, 0, -chunk)
             if {*there[:at]} == {*experiment.names[:at]})  # fmt: skip
    done = next(whole, 0)
    records.truncate(log, done)
    for at in range(done, total, chunk):
        ranks = {c: experiment.algorithm.rank(c) for c in range(at, min(at + chunk, total))}
        cuts = {rank: cut(state.adapter, rank) for rank in {*ranks.values()}}
        orders = [Order((c,), state.round, cuts[r], rank=r) for c, r in ranks.items()]
        began = time.perf_counter()
        own, copy = tee(experiment.engine(orders, experiment.tune))
        held = ((t.adapter, experiment.clients.shards[t.order.clients[0]].test) for t in copy)
        judged_too = zip(own, experiment.sums_of(held), strict=True)
        for number, (tuned, found) in enumerate(judged_too):
            line = {**_own(experiment, run, names, state, tuned), "test": found}
            line["seconds"] = round(time.perf_counter() - began, 3)
            records.append(log, line)
            yield Event("personal", at + number + 1, total, line)
            began = time.perf_counter()
        give_back()


def whole_stacks(stack: int) -> int:
    """Clients in a chunk, so that none but the last stack is short of some.

    For a stack of another size a processor keeps other kernels, and its memory other holes.
    """
    return max(CHUNK // stack, 1) * stack


def _own(
    experiment: Experiment, run: Path, names: dict[str, str], state: ServerState, tuned: Tuned
) -> records.Line:
    """Save a client's own adapter, and say how it was tuned.

    Raises:
        TrainingError: it is not finite.
    """
    client = tuned.order.clients[0]
    shard = experiment.clients.shards[client]
    if not math.isfinite(tuned.history[tuned.chosen]):
        raise TrainingError(
            f"personalisation of client {shard.name}: tuning left the finite numbers: lower "
            f"personal.lr={experiment.settings.personal.lr}, or say personal.fallback=true"
        )
    target = run / "adapters" / "clients" / names[shard.name]
    own = truncated(tuned.adapter, tuned.order.rank)
    save(experiment, target, state, own, shard.name)
    return {
        "client": shard.name,
        "folder": names[shard.name],
        "validation": tuned.history,
        "chosen": tuned.chosen,
        **({} if tuned.share is None else {"share": tuned.share}),
        **({} if tuned.cluster is None else {"cluster": tuned.cluster}),
    }


def _test(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Read the test text, once, under every model."""
    target = run / "evaluation.jsonl"
    if target.exists():
        return
    records.write_lines(target, _rows(experiment, run))
    yield Event("test", 1, 1, {})


def _rows(experiment: Experiment, run: Path) -> Iterator[records.Line]:
    for model in models(experiment):
        yield from test(left(experiment, run, model))
    took_part = records.drawn(run)
    for line in records.each(run / "personal.jsonl"):
        yield tested(line["client"], "personal", line["test"], took_part)


def _judge(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Hold samples of every model against the test pictures, where it is asked for."""
    if experiment.settings.judging.features is None:
        return
    there = judged(experiment)
    for model in judge(experiment, run):
        yield Event("distances", there.index(model) + 1, len(there), {})


def _samples(experiment: Experiment, run: Path) -> Iterator[Event]:
    """What each model makes of the prompts, before and after."""
    own = experiment.names[:SHOWN] if experiment.has_own else ()
    shown = [("personal", name) for name in own]
    state, _ = last(run)
    shared = [(name, None) for name in experiment.shared(state)]
    yield from sampled(experiment, run, [("backbone", None), *shared, *shown])


def sampled(made: Made, run: Path, models: Sequence[tuple[str, str | None]]) -> Iterator[Event]:
    """What models of a run make of the prompts, each told by its name and whose it is."""
    settings, task = made.settings, made.task
    target = run / "samples.jsonl"
    if target.exists():
        return
    found = []
    for done, (model, client) in enumerate(models):
        own, whose = task.model, client or (None if model == "global" else model)
        adapter = own.backbone() if model == "backbone" else own.load(folder_of(run, whose))
        asked = task.samples(adapter, settings.evaluation, settings.federation.seed)
        for number, sample in enumerate(asked):
            row = {"model": model, "client": client, "prompt": sample.prompt}
            if sample.picture is None:
                row["text"] = sample.text
            else:
                row["picture"] = f"samples/{done}-{number}.png"
                files.write(run / row["picture"], png(sample.picture))
            found.append(row)
        yield Event("samples", done + 1, len(models), {})
    records.write_lines(target, found)
