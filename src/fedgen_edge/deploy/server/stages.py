"""A deployment's run from its rounds to its test; every step can be stopped at and gone on from."""

import time
from collections.abc import Iterator, Set
from pathlib import Path

from fedgen_edge.deploy.server.federation import Deployment
from fedgen_edge.deploy.server.site_reports import validate_tuning
from fedgen_edge.deploy.settings import DeploymentSettings
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.hardware import peak_memory
from fedgen_edge.runs import records
from fedgen_edge.runs.build import Sums, split_by_folder
from fedgen_edge.runs.checkpoint import find_latest, load_latest
from fedgen_edge.runs.evaluate import make_test_record
from fedgen_edge.runs.federate import federate
from fedgen_edge.runs.models import save
from fedgen_edge.runs.run import Event, sample_models, sum_stage_seconds
from fedgen_edge.types import ServerState

LONGEST_WAIT = 600.0
"""Seconds between two attempts, at most."""


def proceed(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Do what is left of a run.

    Raises:
        QuorumError: too few sites, too often; what is committed stands.
        CarrierError: the network is gone for long.
    """
    for stage in (_run_rounds, _run_personalization, _run_test, _make_samples):
        yield from stage(deployment, run)
    deployment.registry.write_client_records(run)
    run_facts = records.read_json(run / "run.json")
    peak = max(peak_memory(), run_facts.get("peak_bytes", 0))
    outcome = {"seconds": sum_stage_seconds(run), "peak_bytes": peak, "finished": True}
    records.write_json(run / "run.json", {**run_facts, **outcome})


def iter_pauses(plan: DeploymentSettings) -> Iterator[float]:
    """Seconds before each further attempt; they end when the server is to stop."""
    for attempt in range(plan.attempts - 1):
        yield min(LONGEST_WAIT, plan.back_off * 2**attempt)


def _run_rounds(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Train to the last round; one that misses its quorum is tried again."""
    total, pauses = deployment.settings.federation.rounds, iter_pauses(deployment.plan)
    while True:
        try:
            for line in federate(deployment, run):
                if "refused" not in line:
                    deployment.audit.write("committed", round=line["round"] - 1)
                    deployment.registry.write_client_records(run)
                    pauses = iter_pauses(deployment.plan)
                yield Event("federation", line["round"], total, line)
            break
        except QuorumError as error:
            state, _, _ = find_latest(run)
            completed_rounds = state.round if state else 0
            deployment.audit.write("abandoned", round=completed_rounds)
            pause = next(pauses, None)
            if pause is None:
                raise
            message = f"{error}: abandoned, the model is unchanged; trying again in {pause:g} s"
            yield Event("federation", completed_rounds, total, {"said": message})
            time.sleep(pause)
    state, _ = load_latest(run)
    for name, adapter in split_by_folder(state.adapter).items():
        save(deployment, run / "adapters" / name, state, adapter, name)
        deployment.task.model.check_written(run / "adapters" / name, adapter)


def _run_personalization(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Have every site tune an adapter of its own; of it only numbers come back."""
    state, _ = load_latest(run)
    log = run / "personal.jsonl"
    completed_sites = {line["client"] for line in records.lines(log)}
    records.truncate(log, len(completed_sites))
    pauses, cluster_settings = iter_pauses(deployment.plan), deployment.algorithm.clusters
    clusters = cluster_settings.number if cluster_settings else 0
    while True:
        remaining = [name for name in deployment.find_ready_sites() if name not in completed_sites]
        for name, answer in deployment.ask(
            "personalise", state.round, deployment.encode_payloads(state.adapter, remaining)
        ):
            try:
                line = {
                    "client": name,
                    **validate_tuning(answer.said, deployment.count_names, clusters),
                }
            except RefusedError as error:
                deployment.record_refusal(name, state.round, error)
                continue
            line["folder"] = records.folder_names(deployment.names)[name]
            records.append(log, line)
            completed_sites.add(name)
            total = len({*completed_sites, *deployment.list_active_sites()})
            yield Event("personal", len(completed_sites), total, line)
        absent = [name for name in deployment.list_active_sites() if name not in completed_sites]
        pause = next(pauses, None) if absent else None
        if pause is None:
            break
        time.sleep(pause)
    if absent:
        deployment.tell(f"no personal adapter at {', '.join(absent)}: `fedgen resume` asks again")


def _run_test(deployment: Deployment, run: Path) -> Iterator[Event]:
    """Have sites read their test data under the backbone and the global model, once each."""
    target = run / "evaluation.jsonl"
    test_sums = _read_test_sums(target)
    personal_sums = {line["client"]: line["test"] for line in records.lines(run / "personal.jsonl")}
    if target.exists() and personal_sums.keys() <= test_sums["backbone"].keys():
        return
    absent = _collect_test_sums(deployment, load_latest(run)[0], test_sums, personal_sums.keys())
    if absent:
        deployment.tell(f"no test of {', '.join(absent)}: `fedgen resume` asks again")
    complete_sites = sorted(
        personal_sums.keys() & test_sums["backbone"].keys() & test_sums["global"].keys()
    )
    cohort_members = records.list_cohort_members(run)
    rows = [
        make_test_record(name, model, by_site[name], cohort_members)
        for model, by_site in {**test_sums, "personal": personal_sums}.items()
        for name in complete_sites
    ]
    records.write_lines(target, rows)
    yield Event("test", 1, 1, {})


def _read_test_sums(target: Path) -> dict[str, dict[str, Sums]]:
    """What sites have said of their test data before, by model and site."""
    test_sums: dict[str, dict[str, Sums]] = {"backbone": {}, "global": {}}
    for line in records.lines(target):
        row = {k: v for k, v in line.items() if k not in {"model", "client", "participated"}}
        if line["model"] in test_sums:
            test_sums[line["model"]][line["client"]] = row
    return test_sums


def _collect_test_sums(
    deployment: Deployment,
    state: ServerState,
    test_sums: dict[str, dict[str, Sums]],
    tuned_sites: Set[str],
) -> list[str]:
    """Ask for what is not found yet; returns those of whom something is missing in the end."""
    for pause in (*iter_pauses(deployment.plan), None):
        for model, by_site in test_sums.items():
            remaining = [
                name
                for name in deployment.find_ready_sites()
                if name in tuned_sites and name not in by_site
            ]
            evaluated_sums = deployment.evaluate_sites(
                state, remaining, backbone_only=model == "backbone"
            )
            by_site |= {name: said["test"] for name, said in evaluated_sums.items()}
        absent = [
            name
            for name in deployment.list_active_sites()
            if name in tuned_sites and not all(name in by_site for by_site in test_sums.values())
        ]
        if pause is None or not absent:
            return absent
        time.sleep(pause)
    return []


def _make_samples(deployment: Deployment, run: Path) -> Iterator[Event]:
    """What the backbone and the global model make; sites' own stay where they are."""
    global_models = [(name, None) for name in split_by_folder(load_latest(run)[0].adapter)]
    yield from sample_models(deployment, run, [("backbone", None), *global_models])
