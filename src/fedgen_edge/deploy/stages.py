"""A deployment's run from its rounds to its test; every step can be stopped at and gone on from."""

import time
from collections.abc import Iterator, Set
from pathlib import Path

from fedgen_edge.deploy.federation import Deployment
from fedgen_edge.deploy.said import tuned
from fedgen_edge.deploy.settings import Federation
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Sums, by_folder
from fedgen_edge.experiments.checkpoint import last, latest
from fedgen_edge.experiments.evaluate import tested
from fedgen_edge.experiments.federate import federate
from fedgen_edge.experiments.models import save
from fedgen_edge.experiments.run import Event, sampled, spent
from fedgen_edge.machine import peak_memory
from fedgen_edge.types import ServerState

LONGEST_WAIT = 600.0
"""Seconds between two attempts, at most."""


def proceed(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Do what is left of a run.

    Raises:
        QuorumError: too few sites, too often; what is committed stands.
        CarrierError: the network is gone for long.
    """
    for stage in (_rounds, _personal, _test, _samples):
        yield from stage(deployment, run)
    deployment.roll.report(run)
    told = records.read_json(run / "run.json")
    peak = max(peak_memory(), told.get("peak_bytes", 0))
    found = {"seconds": spent(run), "peak_bytes": peak, "finished": True}
    records.write_json(run / "run.json", {**told, **found})


def waits(plan: Federation) -> Iterator[float]:
    """Seconds before each further attempt; they end when the server is to stop."""
    for failed in range(plan.attempts - 1):
        yield min(LONGEST_WAIT, plan.back_off * 2**failed)


def _rounds(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Train to the last round; one that misses its quorum is tried again."""
    total, pauses = deployment.settings.federation.rounds, waits(deployment.plan)
    while True:
        try:
            for line in federate(deployment, run):
                if "refused" not in line:
                    deployment.audit.write("committed", round=line["round"] - 1)
                    deployment.roll.report(run)
                    pauses = waits(deployment.plan)
                yield Event("federation", line["round"], total, line)
            break
        except QuorumError as error:
            state, _, _ = latest(run)
            done = state.round if state else 0
            deployment.audit.write("abandoned", round=done)
            pause = next(pauses, None)
            if pause is None:
                raise
            said = f"{error}: abandoned, the model is unchanged; trying again in {pause:g} s"
            yield Event("federation", done, total, {"said": said})
            time.sleep(pause)
    state, _ = last(run)
    for name, adapter in by_folder(state.adapter).items():
        save(deployment, run / "adapters" / name, state, adapter, name)
        deployment.task.model.check_written(run / "adapters" / name, adapter)


def _personal(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Have every site tune an adapter of its own; of it only numbers come back."""
    state, _ = last(run)
    log = run / "personal.jsonl"
    done = {line["client"] for line in records.lines(log)}
    records.truncate(log, len(done))
    pauses, there = waits(deployment.plan), deployment.algorithm.clusters
    clusters = there.number if there else 0
    while True:
        left = [name for name in deployment.ready() if name not in done]
        for name, answer in deployment.ask(
            "personalise", state.round, deployment.payloads(state.adapter, left)
        ):
            try:
                line = {"client": name, **tuned(answer.said, deployment.counts, clusters)}
            except RefusedError as error:
                deployment.offended(name, state.round, error)
                continue
            line["folder"] = records.folder_names(deployment.names)[name]
            records.append(log, line)
            done.add(name)
            total = len({*done, *deployment.awaited()})
            yield Event("personal", len(done), total, line)
        away = [name for name in deployment.awaited() if name not in done]
        pause = next(pauses, None) if away else None
        if pause is None:
            break
        time.sleep(pause)
    if away:
        deployment.tell(f"no personal adapter at {', '.join(away)}: `fedgen resume` asks again")


def _test(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Have sites read their test data under the backbone and the global model, once each."""
    target = run / "evaluation.jsonl"
    found = _tested(target)
    own = {line["client"]: line["test"] for line in records.lines(run / "personal.jsonl")}
    if target.exists() and own.keys() <= found["backbone"].keys():
        return
    away = _evaluate(deployment, last(run)[0], found, own.keys())
    if away:
        deployment.tell(f"no test of {', '.join(away)}: `fedgen resume` asks again")
    whole = sorted(own.keys() & found["backbone"].keys() & found["global"].keys())
    took_part = records.drawn(run)
    rows = [
        tested(name, model, by_site[name], took_part)
        for model, by_site in {**found, "personal": own}.items()
        for name in whole
    ]
    records.write_lines(target, rows)
    yield Event("test", 1, 1, {})


def _tested(target: Path) -> dict[str, dict[str, Sums]]:
    """What sites have said of their test data before, by model and site."""
    found: dict[str, dict[str, Sums]] = {"backbone": {}, "global": {}}
    for line in records.lines(target):
        row = {k: v for k, v in line.items() if k not in {"model", "client", "participated"}}
        if line["model"] in found:
            found[line["model"]][line["client"]] = row
    return found


def _evaluate(
    deployment: Deployment, state: ServerState, found: dict[str, dict[str, Sums]], own: Set[str]
) -> list[str]:
    """Ask for what is not found yet; returns those of whom something is missing in the end."""
    for pause in (*waits(deployment.plan), None):
        for model, by_site in found.items():
            left = [name for name in deployment.ready() if name in own and name not in by_site]
            judged = deployment.evaluated(state, left, bare=model == "backbone")
            by_site |= {name: said["test"] for name, said in judged.items()}
        away = [
            name
            for name in deployment.awaited()
            if name in own and not all(name in by_site for by_site in found.values())
        ]
        if pause is None or not away:
            return away
        time.sleep(pause)
    return []


def _samples(deployment: Deployment, run: Path) -> Iterator[Event]:
    """What the backbone and the global model make; sites' own stay where they are."""
    shared = [(name, None) for name in by_folder(last(run)[0].adapter)]
    yield from sampled(deployment, run, [("backbone", None), *shared])
