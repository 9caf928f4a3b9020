"""A deployment's run from its rounds to its test; every step can be stopped at and gone on from."""

import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedgen_edge.deploy.federation import Deployment, sums
from fedgen_edge.deploy.settings import Federation
from fedgen_edge.engines.exchange import Answer
from fedgen_edge.engines.payload import shown
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import Sums
from fedgen_edge.experiments.checkpoint import last, latest
from fedgen_edge.experiments.evaluate import drawn, tested
from fedgen_edge.experiments.federate import federate
from fedgen_edge.experiments.machine import peak_memory
from fedgen_edge.experiments.models import save
from fedgen_edge.experiments.run import Event, sampled, spent

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
    save(deployment, run / "adapters" / "global", state, state.adapter, "global")


def _personal(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Have every site tune an adapter of its own; of it only numbers come back."""
    state, _ = last(run)
    log = run / "personal.jsonl"
    folders = records.folder_names(deployment.names)
    payload = deployment.payload(state.adapter)
    done = {line["client"] for line in records.lines(log)}
    pauses = waits(deployment.plan)
    while due := _due(deployment, done):
        total = len(done) + len(due)
        left = [name for name in deployment.ready() if name in due]
        for name, answer in deployment.ask("personalise", state.round, payload, left):
            try:
                line = {"client": name, "folder": folders[name], **_tuned(answer)}
            except RefusedError as error:
                deployment.offended(name, state.round, error)
            else:
                records.append(log, line)
                done.add(name)
                yield Event("personal", len(done), total, line)
        if away := _due(deployment, done):
            pause = next(pauses, None)
            if pause is None:
                said = ", ".join(away)
                deployment.tell(f"no personal adapter at {said}: `fedgen resume` asks again")
                return
            time.sleep(pause)


def _due(deployment: Deployment, done: Collection[str]) -> list[str]:
    """Sites that joined and are not done; nobody waits for one that may not take part any more."""
    able = deployment.able()
    return [name for name in deployment.roll.weights() if name in able and name not in done]


def _tuned(answer: Answer) -> dict[str, Any]:
    """What a site says of its own adapter.

    Raises:
        RefusedError: it is not what was asked for.
    """
    said = answer.said
    history, chosen, seconds = (said.get(k) for k in ("validation", "chosen", "seconds"))
    numbers = history if isinstance(history, list) else []
    good = numbers and all(type(v) is float and math.isfinite(v) for v in numbers)
    if not good or len(numbers) > 10_000 or type(chosen) is not int:
        raise RefusedError("bad-numbers", f"validation is {shown(history)}")
    if not 0 <= chosen < len(numbers) or not isinstance(seconds, int | float):
        raise RefusedError("bad-numbers", f"chosen is {shown(chosen)}")
    found = sums(said.get("test"))
    return {"validation": numbers, "chosen": chosen, "test": found, "seconds": float(seconds)}


def _test(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Have sites read their test data under the backbone and the global model, once."""
    target = run / "evaluation.jsonl"
    if target.exists():
        return
    state, _ = last(run)
    own = {line["client"]: line["test"] for line in records.lines(run / "personal.jsonl")}
    found: dict[str, dict[str, Sums]] = {"backbone": {}, "global": {}}
    for pause in (*waits(deployment.plan), None):
        for model, by_site in found.items():
            left = [name for name in deployment.ready() if name not in by_site]
            judged = deployment.evaluated(state, left, bare=model == "backbone")
            by_site |= {name: said["test"] for name, said in judged.items()}
        wanted = own.keys() & deployment.able()
        if pause is None or all(wanted <= by_site.keys() for by_site in found.values()):
            break
        time.sleep(pause)
    whole = sorted(own.keys() & found["backbone"].keys() & found["global"].keys())
    took_part = drawn(run)
    rows = [
        tested(name, model, by_site[name], took_part)
        for model, by_site in {**found, "personal": own}.items()
        for name in whole
    ]
    records.write_lines(target, rows)
    yield Event("test", 1, 1, {})


def _samples(deployment: Deployment, run: Path) -> Iterator[Event]:
    """What the backbone and the global model make; sites' own stay where they are."""
    yield from sampled(deployment, run, [("backbone", None), ("global", None)])
