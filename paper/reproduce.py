"""Rebuild a claim: run its recipe for every seed, and keep the records and the table.

    python paper/reproduce.py paper/quickstart.toml

Writes `paper/results/NAME.jsonl`, a line for every seed, model and client, and
`paper/results/NAME.md`, the table made from it alone. Finished runs in `--runs` are not done again.
"""

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from fedgen_edge.config import Settings
from fedgen_edge.hardware import steady_allocations
from fedgen_edge.report.summary import paired_interval, read, uplink
from fedgen_edge.runs.formatting import size
from fedgen_edge.runs.records import lines, read_json, write_lines
from fedgen_edge.tasks.language.task import MEASURE
from items import Row, of_recipe
from kept import RESULTS
from running import finished


def carry_out(settings: Settings, seed: int, folder: Path) -> list[Row]:
    """The test records of one seed's run."""
    settings = replace(settings, federation=replace(settings.federation, seed=seed))
    folder = finished(settings, folder)
    told, sent = read_json(folder / "run.json"), uplink(read(folder))
    facts = {"seed": seed, "hardware": told["hardware"], "precision": told["precision"]}
    facts |= {"seconds_of": told["seconds"], "peak_bytes": told["peak_bytes"]}
    facts |= {"bytes_up": sent.up, "bytes_full": sent.full}
    kept = ("model", "client", "participated", "total", "count", "words")
    return [{**facts, **{k: row[k] for k in kept}} for row in lines(folder / "evaluation.jsonl")]


def read_records(name: str) -> list[Row]:
    """The records of a claim."""
    return lines(RESULTS / f"{name}.jsonl")


def means(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Mean perplexity over the clients that some round drew, by model and seed."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in (r for r in rows if r["participated"]):
        each = found.setdefault(row["model"], {}).setdefault(row["seed"], [])
        each.append(MEASURE.compute(row["total"], row["count"]))
    return {m: {s: fmean(v) for s, v in seeds.items()} for m, seeds in found.items()}


def _training_seconds(row: Row) -> float:
    told = row["seconds_of"]
    return told["federation"] + told["personal"] + sum(told["baselines"].values())


def table(claim: Row, rows: Sequence[Row]) -> str:
    """The claim's table in Markdown, from its records alone."""
    found, seeds = means(rows), claim["seeds"]
    first = rows[0]
    out = [
        f"Recipe `{claim['recipe']}`, seeds {', '.join(map(str, seeds))}; {first['hardware']}, "
        f"{first['precision']}. Mean over clients of test perplexity (token level).",
        "",
        "| model | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for model, by_seed in found.items():
        cells = [f"{by_seed[s]:.2f}" for s in seeds]
        out.append(f"| {model} | {' | '.join(cells)} | {fmean(by_seed.values()):.2f} |")
    out += ["", "| difference | mean | 95 % interval over seeds |", "|---|---|---|"]
    for model, reference in claim["differences"]:
        apart = [found[model][s] - found[reference][s] for s in seeds]
        mean, low, high = paired_interval(apart)
        out.append(f"| {model} less {reference} | {mean:.2f} | {low:.2f} to {high:.2f} |")
    if "against" in claim:
        other = means(read_records(claim["against"]))["personal"]
        mean, low, high = paired_interval([other[s] - found["personal"][s] for s in seeds])
        named = f"personal of `{claim['against']}` less personal here"
        out.append(f"| {named} | {mean:.2f} | {low:.2f} to {high:.2f} |")
    spent = [max(_training_seconds(r) for r in rows if r["seed"] == s) for s in seeds]
    out += [
        "",
        f"Training takes {min(spent):.0f} to {max(spent):.0f} seconds a run, all methods together; "
        f"the peak memory of the first run's process is {size(first['peak_bytes'])}.",
    ]
    if not first["bytes_up"]:
        return "\n".join(out) + "\n"
    saved = 100 * (1 - first["bytes_up"] / first["bytes_full"])
    out += [
        "",
        f"Sent by clients in a run: {size(first['bytes_up'])}; full-model FedAvg would have sent "
        f"{size(first['bytes_full'])} (float32): {saved:.2f} % saved.",
    ]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--table-only", action="store_true", help="from the records that are there")
    told = parser.parse_args()
    claim = tomllib.loads(told.claim.read_text())
    if not told.table_only:
        steady_allocations()
        settings = of_recipe(claim, told.claim.parent.parent)
        made = [
            row
            for seed in claim["seeds"]
            for row in carry_out(settings, seed, told.runs / f"{told.claim.stem}-{seed}")
        ]
        write_lines(RESULTS / f"{told.claim.stem}.jsonl", made)
    rows = read_records(told.claim.stem)
    (RESULTS / f"{told.claim.stem}.md").write_text(table(claim, rows))
    print(table(claim, rows))


if __name__ == "__main__":
    main()
