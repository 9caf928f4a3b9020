"""How far a federation is, and how its sites fare, from the files that its server writes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from fedgen_edge.config import load
from fedgen_edge.deploy import audit
from fedgen_edge.deploy.members import members
from fedgen_edge.deploy.roll import opened
from fedgen_edge.deploy.settings import Federation, read
from fedgen_edge.experiments import records
from fedgen_edge.experiments.record_types import ServerFacts
from fedgen_edge.experiments.summary import printable, size

Row = dict[str, Any]


def lines(folder: Path) -> Iterator[str]:
    """A few lines on the whole.

    Raises:
        FedGenError: the folder is no server's, or its log was altered.
    """
    plan, run = read(Federation, folder / "federation.toml"), folder / "run"
    total, log = load(folder / "recipe.toml").federation.rounds, audit.lines(run / "audit.jsonl")
    done = records.lines(run / "rounds.jsonl")
    events = Counter(line["event"] for line in log)
    yield f"federation at {plan.address}: round {len(done)} of {total}, {_state(run)}"
    yield (
        f"{events['abandoned']} attempts abandoned; {events['accepted']} updates accepted, "
        f"{events['refused']} refused, {events['declined']} declined by their sites, "
        f"{events['failed']} failed"
    )
    up, down = (sum(line[k] for line in done) for k in ("bytes_up", "bytes_down"))
    tuned = len(records.lines(run / "personal.jsonl"))
    yield f"{size(up)} up, {size(down)} down; {tuned} sites have a personal adapter"
    for line in done[-1:]:
        loss = "unknown" if line["loss"] is None else f"{line['loss']:.3f}"
        yield f"last round: {line['seconds']:.0f} s, loss {loss}"


def _state(run: Path) -> str:
    path = run / "run.json"
    told = records.read_json(path, ServerFacts) if path.exists() else None
    if told is None:
        return "not begun: `fedgen server` begins it"
    if told["finished"]:
        return "finished"
    return "running" if records.held(run) else "stopped: `fedgen resume` goes on"


def rows(folder: Path) -> list[Row]:
    """Of each site: its name, state, examples, last round that counts, lag, bytes, refusals."""
    plan, run = read(Federation, folder / "federation.toml"), folder / "run"
    log, done = audit.lines(run / "audit.jsonl"), records.lines(run / "rounds.jsonl")
    may, offences = members(folder), audit.offences(log)
    now = records.read_json(run / "now.json") if (run / "now.json").exists() else {"there": []}
    there = set(now["there"]) if records.held(run) else set()
    weights, roll = opened(run / "sites.json").weights(), opened(run / "sites.json").names
    found = []
    for name in sorted({*may, *roll}):
        took = [row for line in done for row in line["clients"] if row["client"] == name]
        rounds = [line["round"] for line in done if name in line["cohort"]]
        last = max(rounds, default=0)
        state = "there" if name in there else "away"
        if offences[name] >= plan.offences:
            state = "left out"
        found.append(
            {
                "site": name,
                "state": state if name in may else "revoked",
                "examples": weights.get(name),
                "rounds": len(rounds),
                "last": last,
                "lag": len(done) - last,
                "bytes_up": sum(row["bytes_up"] for row in took),
                "refused": offences[name],
            }
        )
    return found


def table(folder: Path) -> Table:
    """The same for a terminal."""
    out = Table("site", "state", "examples", "rounds", "last", "lag", "sent", "refused")
    for row in rows(folder):
        examples = "" if row["examples"] is None else f"{row['examples']:,}"
        numbers = (str(row[k]) for k in ("rounds", "last", "lag"))
        out.add_row(
            printable(row["site"]), row["state"], examples, *numbers, size(row["bytes_up"]),
            str(row["refused"]),
        )  # fmt: skip
    return out
