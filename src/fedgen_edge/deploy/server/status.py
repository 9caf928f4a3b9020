"""How far a federation is, and how its sites fare, from the files that its server writes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from fedgen_edge.config import load
from fedgen_edge.deploy.members import read_member_keys
from fedgen_edge.deploy.server import audit
from fedgen_edge.deploy.server.registry import open_registry
from fedgen_edge.deploy.settings import DeploymentSettings, read
from fedgen_edge.runs import records
from fedgen_edge.runs.formatting import printable, size
from fedgen_edge.runs.record_types import ServerRunRecord

Row = dict[str, Any]


def summarize_status(folder: Path) -> Iterator[str]:
    """A few lines on the whole.

    Raises:
        FedGenError: the folder is no server's, or its log was altered.
    """
    plan, run = read(DeploymentSettings, folder / "federation.toml"), folder / "run"
    total, log = (
        load(folder / "recipe.toml").federation.rounds,
        audit.read_lines(run / "audit.jsonl"),
    )
    round_records = records.lines(run / "rounds.jsonl")
    events = Counter(line["event"] for line in log)
    yield (
        f"federation at {plan.address}: round {len(round_records)} of {total}, "
        f"{_describe_state(run)}"
    )
    yield (
        f"{events['abandoned']} attempts abandoned; {events['accepted']} updates accepted, "
        f"{events['refused']} refused, {events['declined']} declined by their sites, "
        f"{events['failed']} failed"
    )
    bytes_up, bytes_down = (
        sum(line[k] for line in round_records) for k in ("bytes_up", "bytes_down")
    )
    tuned_count = len(records.lines(run / "personal.jsonl"))
    sent = f"{size(bytes_up)} up, {size(bytes_down)} down"
    yield f"{sent}; {tuned_count} sites have a personal adapter"
    for line in round_records[-1:]:
        loss = "unknown" if line["loss"] is None else f"{line['loss']:.3f}"
        yield f"last round: {line['seconds']:.0f} s, loss {loss}"


def _describe_state(run: Path) -> str:
    path = run / "run.json"
    run_facts = records.read_json(path, ServerRunRecord) if path.exists() else None
    if run_facts is None:
        return "not begun: `fedgen server` begins it"
    if run_facts["finished"]:
        return "finished"
    return "running" if records.is_locked(run) else "stopped: `fedgen resume` goes on"


def list_sites(folder: Path) -> list[Row]:
    """Of each site: its name, state, examples, last round that counts, lag, bytes, refusals."""
    plan, run = read(DeploymentSettings, folder / "federation.toml"), folder / "run"
    log, round_records = audit.read_lines(run / "audit.jsonl"), records.lines(run / "rounds.jsonl")
    member_keys, refusals = read_member_keys(folder), audit.count_refusals(log)
    presence = records.read_json(run / "now.json") if (run / "now.json").exists() else {"there": []}
    present = set(presence["there"]) if records.is_locked(run) else set()
    weights, site_names = (
        open_registry(run / "sites.json").weights(),
        open_registry(run / "sites.json").names,
    )
    site_rows = []
    for name in sorted({*member_keys, *site_names}):
        updates = [
            row for line in round_records for row in line["clients"] if row["client"] == name
        ]
        rounds = [line["round"] for line in round_records if name in line["cohort"]]
        last_round = max(rounds, default=0)
        state = "there" if name in present else "away"
        if refusals[name] >= plan.offences:
            state = "left out"
        site_rows.append(
            {
                "site": name,
                "state": state if name in member_keys else "revoked",
                "examples": weights.get(name),
                "rounds": len(rounds),
                "last": last_round,
                "lag": len(round_records) - last_round,
                "bytes_up": sum(row["bytes_up"] for row in updates),
                "refused": refusals[name],
            }
        )
    return site_rows


def make_table(folder: Path) -> Table:
    """The same for a terminal."""
    out = Table("site", "state", "examples", "rounds", "last", "lag", "sent", "refused")
    for row in list_sites(folder):
        examples = "" if row["examples"] is None else f"{row['examples']:,}"
        numbers = (str(row[k]) for k in ("rounds", "last", "lag"))
        out.add_row(
            printable(row["site"]), row["state"], examples, *numbers, size(row["bytes_up"]),
            str(row["refused"]),
        )  # fmt: skip
    return out
