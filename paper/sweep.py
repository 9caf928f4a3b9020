"""Compare variants of one recipe by quality and bytes, for every seed and division of the data.

    python paper/sweep.py paper/compression.toml

Writes `paper/results/NAME.jsonl`, a line for every division, variant and seed, and
`paper/results/NAME.md`, the tables made from it alone. Finished runs in `--runs` are not done
again.
`--only VARIANT` does one of them, and leaves the table as it is.
"""

import argparse
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from reproduce import RESULTS, Row, finished, settings_of

from fedgen_edge.config import Settings
from fedgen_edge.experiments.machine import steady_allocations
from fedgen_edge.experiments.records import lines, read_json, write_lines
from fedgen_edge.experiments.summary import by_client, paired_interval, read, shared, size, uplink
from fedgen_edge.tasks.language import MEASURE


def cases(claim: Row) -> Iterator[tuple[str, str, int, Row]]:
    """Division, variant, seed, and what they override."""
    for division, held in claim.get("divisions", {"": {}}).items():
        for variant, told in claim["variants"].items():
            for seed in claim["seeds"]:
                yield division, variant, seed, merged(claim.get("overrides", {}), held, told)


def merged(*tables: Row) -> Row:
    """Settings over settings, part by part."""
    found: Row = {}
    for table in tables:
        for part, values in table.items():
            found[part] = {**found.get(part, {}), **values}
    return found


def record(settings: Settings, folder: Path) -> Row:
    """What a run's files say: its way, its bytes, and its test."""
    folder = finished(settings, folder)
    run, told = read(folder), read_json(folder / "run.json")
    sent, judged = uplink(run), shared(run)
    way, up, down = [], 0, 0
    for line in lines(folder / "rounds.jsonl"):
        up, down = up + line["bytes_up"], down + line["bytes_down"]
        if line["validation"]:
            own = line["validation"]
            way.append([line["round"], up, down, own["total"] / own["count"]])
    test = {model: fmean(by_client(MEASURE, rows).values()) for model, rows in judged.items()}
    facts = {k: told[k] for k in ("hardware", "precision", "seconds")}
    return {**facts, "bytes_up": up, "bytes_down": down, "bytes_full": sent.full, "test": test,
            "way": way}  # fmt: skip


def target(claim: Row, rows: Sequence[Row], row: Row) -> float:
    """The validation loss that counts as the reference's, of the same division and seed."""
    (last,) = [
        own["way"][-1][3]
        for own in rows
        if own["variant"] == claim["reference"]
        and (own["division"], own["seed"]) == (row["division"], row["seed"])
    ]
    return last + math.log1p(claim["within"])


def reached(row: Row, loss: float) -> Row | None:
    """The first judged round at which a run's loss is that low: its number and bytes."""
    for at, up, down, found in row["way"]:
        if found <= loss:
            return {"round": at, "up": up, "down": down}
    return None


def table(claim: Row, rows: Sequence[Row]) -> str:
    """The claim's tables in Markdown, one a division."""
    first, seeds = rows[0], ", ".join(map(str, claim["seeds"]))
    out = [
        f"Recipe `{claim['recipe']}` as in `paper/{claim['name']}.toml`, seeds {seeds}; "
        f"{first['hardware']}, {first['precision']}. Test perplexity (token level), mean over "
        f"clients, then over seeds; differences with their 95 % interval (Student's t over seeds, "
        f"paired). Target: the validation loss of `{claim['reference']}` after its last round, and "
        f"{claim['within']:.0%} of perplexity more; a dash where some seed does not reach it.",
    ]
    for division in dict.fromkeys(row["division"] for row in rows):
        own = [row for row in rows if row["division"] == division]
        out += ["", *([f"**{division}**", ""] if division else []), *_division(claim, rows, own)]
    return "\n".join(out) + "\n"


def _division(claim: Row, rows: Sequence[Row], own: Sequence[Row]) -> list[str]:
    out = [
        f"| variant | perplexity | less `{claim['reference']}` | uplink | saved of full-model "
        "FedAvg | uplink to target | downlink to target | rounds to target |",
        "|---" * 8 + "|",
    ]
    base = _by_seed(own, claim["reference"])
    for variant in dict.fromkeys(row["variant"] for row in own):
        mine = [row for row in own if row["variant"] == variant]
        found = _by_seed(own, variant)
        apart = "" if variant == claim["reference"] else _apart(found, base)
        up, full = fmean(r["bytes_up"] for r in mine), fmean(r["bytes_full"] for r in mine)
        when = [reached(row, target(claim, rows, row)) for row in mine]
        there = [w for w in when if w]
        all_there = len(there) == len(when)
        cells = [
            variant,
            f"{fmean(found.values()):.2f}",
            apart,
            size(up),
            f"{100 * (1 - up / full):.2f} %",
            *(size(fmean(w[k] for w in there)) if all_there else "-" for k in ("up", "down")),
            f"{fmean(w['round'] for w in there):.1f}" if all_there else "-",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return out


def _by_seed(rows: Sequence[Row], variant: str) -> dict[int, float]:
    return {row["seed"]: row["test"]["global"] for row in rows if row["variant"] == variant}


def _apart(found: dict[int, float], base: dict[int, float]) -> str:
    mean, low, high = paired_interval([found[s] - base[s] for s in base])
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--only", help="one variant")
    parser.add_argument("--data", help="path of the recipe's data, where it is not the recipe's")
    parser.add_argument("--backbone", help="path of the recipe's backbone, likewise")
    parser.add_argument("--table-only", action="store_true", help="from the records that are there")
    told = parser.parse_args()
    claim = {"name": told.claim.stem, **tomllib.loads(told.claim.read_text())}
    if not told.table_only:
        steady_allocations()
        here = {
            part: {"path": path}
            for part, path in (("data", told.data), ("backbone", told.backbone))
            if path
        }
        made = []
        for division, variant, seed, overrides in cases(claim):
            if told.only in {None, variant}:
                own = {**claim, "overrides": merged(overrides, here)}
                settings = settings_of(own, told.claim.parent.parent)
                settings = replace(settings, federation=replace(settings.federation, seed=seed))
                name = "-".join([claim["name"], *filter(None, (division, variant)), str(seed)])
                row = record(settings, told.runs / name.replace(" ", "_"))
                made.append({"division": division, "variant": variant, "seed": seed, **row})
        if told.only is None:
            write_lines(RESULTS / f"{claim['name']}.jsonl", made)
    if told.only is None:
        rows = lines(RESULTS / f"{claim['name']}.jsonl")
        (RESULTS / f"{claim['name']}.md").write_text(table(claim, rows))
        print(table(claim, rows))


if __name__ == "__main__":
    main()
