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
from fedgen_edge.adapters.ranks import mask_rank, truncate_rank
from fedgen_edge.config import Settings, to_toml
from fedgen_edge.errors import TrainingError
from fedgen_edge.federation.jobs import TuningResult
from fedgen_edge.hardware import peak_memory, trim_memory
from fedgen_edge.runs import records
from fedgen_edge.runs.build import Experiment, build, with_method
from fedgen_edge.runs.checkpoint import load_latest
from fedgen_edge.runs.evaluate import list_models, load_method_result, make_test_record, test
from fedgen_edge.runs.federate import federate
from fedgen_edge.runs.judge import judge, list_judged_models
from fedgen_edge.runs.models import find_model_folder, record_changes, save
from fedgen_edge.runs.provenance import RunContext, holdings, provenance
from fedgen_edge.tasks.images.common import encode_png
from fedgen_edge.types import Order, ServerState

CHUNK = 64
"""Most clients whose personal adapters are in memory at once; a larger stack is a chunk."""
SAMPLED_CLIENTS = 3
"""Clients whose samples the report shows."""


@dataclass(frozen=True)
class Event:
    """Something that a person who waits would like to know."""

    stage: str
    """federation, baselines/NAME, personal, test, distances or samples."""
    completed: int
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
        client_records, facts = holdings(experiment), provenance(experiment)
        records.claim(out)
        files.write(out / "settings.toml", to_toml(experiment.settings).encode())
        records.write_json(out / "clients.json", client_records)
        records.write_json(out / "run.json", facts)
    except BaseException:  # workers must not outlive a run that was never made
        experiment.close()
        raise
    return experiment


def proceed(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Do what is left of a run, from its last commit to its test."""
    with records.lock_run(run):
        files.clean_drafts(run)
        record_changes(run)
        with closing(experiment):
            for stage in _stages(experiment, run):
                yield from stage
                trim_memory()
        facts = records.read_json(run / "run.json")
        peak = max(peak_memory(), facts.get("peak_bytes", 0))
        outcome = {"seconds": sum_stage_seconds(run), "peak_bytes": peak, "finished": True}
        records.write_json(run / "run.json", {**facts, **outcome})


def _stages(experiment: Experiment, run: Path) -> Iterator[Iterator[Event]]:
    yield _federation(experiment, run, "federation")
    for name in experiment.settings.evaluation.baselines:
        stage = f"baselines/{name}"
        yield _federation(with_method(experiment, name), run / stage, stage)
    if experiment.has_personal_models:
        yield _personal(experiment, run)
    yield _test(experiment, run)
    yield _judge(experiment, run)
    yield _samples(experiment, run)


def sum_stage_seconds(run: Path) -> dict[str, Any]:
    """Seconds of each stage, summed over its records: a stop in between does not count."""
    seconds = {
        log: sum(line.get("seconds", 0.0) for line in records.iter_lines(run / log))
        for log in ("rounds.jsonl", "personal.jsonl", "evaluation.jsonl", "distances.jsonl")
    }
    baselines = {
        log.parent.name: sum(line.get("seconds", 0.0) for line in records.iter_lines(log))
        for log in sorted(run.glob("baselines/*/rounds.jsonl"))
    }
    return {
        "federation": seconds["rounds.jsonl"],
        "baselines": baselines,
        "personal": seconds["personal.jsonl"],
        "test": seconds["evaluation.jsonl"],
        "distances": seconds["distances.jsonl"],
    }


def _federation(experiment: Experiment, folder: Path, stage: str) -> Iterator[Event]:
    """Train to the last round; a line and a commit each."""
    total = experiment.settings.federation.rounds
    for line in federate(experiment, folder):
        yield Event(stage, line["round"], total, line)
    state, _ = load_latest(folder)
    for name, adapter in experiment.get_shared_adapters(state).items():
        save(experiment, folder / "adapters" / name, state, adapter, name)
        experiment.task.model.check_written(folder / "adapters" / name, adapter)


def _personal(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Tune every client's own adapter, a chunk at a time; whole chunks are not done again."""
    state, memory = load_latest(run)
    experiment = experiment.with_client_states(memory)
    log, total = run / "personal.jsonl", len(experiment.holdings)
    names = records.folder_names(experiment.names)
    recorded_clients = [line["client"] for line in records.iter_lines(log)]
    if len(recorded_clients) == total:
        return
    chunk = whole_stacks(experiment.settings.engine.stack or 1)
    # lines of a chunk are in the order of its stacks, and another stack size has other chunks
    resume_points = (at for at in range(len(recorded_clients) // chunk * chunk, 0, -chunk)
             if {*recorded_clients[:at]} == {*experiment.names[:at]})  # fmt: skip
    completed = next(resume_points, 0)
    records.truncate(log, completed)
    for at in range(completed, total, chunk):
        ranks = {c: experiment.algorithm.get_rank(c) for c in range(at, min(at + chunk, total))}
        cuts = {rank: mask_rank(state.adapter, rank) for rank in {*ranks.values()}}
        orders = [Order((c,), state.round, cuts[r], rank=r) for c, r in ranks.items()]
        began = time.perf_counter()
        tuned_clients, copy = tee(experiment.engine(orders, experiment.tune))
        test_sets = ((t.adapter, experiment.clients.shards[t.order.clients[0]].test) for t in copy)
        tuned_with_sums = zip(tuned_clients, experiment.evaluate_clients(test_sets), strict=True)
        for number, (tuned, test_sums) in enumerate(tuned_with_sums):
            line = {**_save_personal(experiment, run, names, state, tuned), "test": test_sums}
            line["seconds"] = round(time.perf_counter() - began, 3)
            records.append(log, line)
            yield Event("personal", at + number + 1, total, line)
            began = time.perf_counter()
        trim_memory()


def whole_stacks(stack: int) -> int:
    """Clients in a chunk, so that none but the last stack is short of some.

    For a stack of another size a processor keeps other kernels, and its memory other holes.
    """
    return max(CHUNK // stack, 1) * stack


def _save_personal(
    experiment: Experiment,
    run: Path,
    names: dict[str, str],
    state: ServerState,
    tuned: TuningResult,
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
    adapter = truncate_rank(tuned.adapter, tuned.order.rank)
    save(experiment, target, state, adapter, shard.name)
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
    for model in list_models(experiment):
        yield from test(load_method_result(experiment, run, model))
    cohort_members = records.list_cohort_members(run)
    for line in records.iter_lines(run / "personal.jsonl"):
        yield make_test_record(line["client"], "personal", line["test"], cohort_members)


def _judge(experiment: Experiment, run: Path) -> Iterator[Event]:
    """Hold samples of every model against the test pictures, where it is asked for."""
    if experiment.settings.image_metrics.features is None:
        return
    model_names = list_judged_models(experiment)
    for model in judge(experiment, run):
        yield Event("distances", model_names.index(model) + 1, len(model_names), {})


def _samples(experiment: Experiment, run: Path) -> Iterator[Event]:
    """What each model makes of the prompts, before and after."""
    clients = experiment.names[:SAMPLED_CLIENTS] if experiment.has_personal_models else ()
    personal_models = [("personal", name) for name in clients]
    state, _ = load_latest(run)
    shared = [(name, None) for name in experiment.get_shared_adapters(state)]
    yield from sample_models(experiment, run, [("backbone", None), *shared, *personal_models])


def sample_models(
    context: RunContext, run: Path, models: Sequence[tuple[str, str | None]]
) -> Iterator[Event]:
    """What models of a run make of the prompts, each told by its name and whose it is."""
    settings, task = context.settings, context.task
    target = run / "samples.jsonl"
    if target.exists():
        return
    rows = []
    for model_index, (model, client) in enumerate(models):
        adapted, owner = task.model, client or (None if model == "global" else model)
        adapter = (
            adapted.get_backbone_leaves()
            if model == "backbone"
            else adapted.load(find_model_folder(run, owner))
        )
        samples = task.samples(adapter, settings.evaluation, settings.federation.seed)
        for number, sample in enumerate(samples):
            row = {"model": model, "client": client, "prompt": sample.prompt}
            if sample.image is None:
                row["text"] = sample.text
            else:
                row["picture"] = f"samples/{model_index}-{number}.png"
                files.write(run / row["picture"], encode_png(sample.image))
            rows.append(row)
        yield Event("samples", model_index + 1, len(models), {})
    records.write_lines(target, rows)
