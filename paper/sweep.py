"""Compare variants of one recipe by quality and bytes, for every seed and division of the data.

    python paper/sweep.py paper/compression.toml

Writes `paper/results/NAME.jsonl`, a line for every division, variant and seed, and
`paper/results/NAME.md`, the tables made from it alone. Where the file has a `[tuning]`, each
variant first has as many trials as the others, on a seed and division of their own, and runs with
what had the lowest validation loss; `paper/results/NAME-trials.jsonl` has a line a trial. Finished
runs in `--runs` are not done again. `--only VARIANT` does one of them, and leaves the table as it
is.
"""

import argparse
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from reproduce import RESULTS, Row, finished, settings_of

from fedgen_edge.config import Settings
from fedgen_edge.experiments.records import lines, read_json, write_lines
from fedgen_edge.experiments.summary import by_client, paired_interval, read, shared, size, uplink
from fedgen_edge.machine import steady_allocations
from fedgen_edge.tasks.language import MEASURE


class Case(NamedTuple):
    """One run of the sweep."""

    division: str
    variant: str
    seed: int
    overrides: Row


def cases(claim: Row, chosen: dict[str, Row]) -> Iterator[Case]:
    """Every division, variant and seed, each variant with what its trials chose."""
    for division, held in claim.get("divisions", {"": {}}).items():
        for variant in claim["variants"]:
            for seed in claim["seeds"]:
                overrides = merged(held, settled(claim, variant), chosen.get(variant, {}))
                yield Case(division, variant, seed, overrides)


def trials(claim: Row) -> Iterator[tuple[Case, Row]]:
    """What each variant tries: its own list, or all variants'."""
    told = claim["tuning"]
    held = claim["divisions"][told["division"]]
    for variant, own in claim["variants"].items():
        for trial in own.get("trials", told["trials"]):
            overrides = merged(held, settled(claim, variant), trial)
            yield Case(told["division"], variant, told["seed"], overrides), trial


def settled(claim: Row, variant: str) -> Row:
    """What a variant overrides, whatever its trials say."""
    return {part: told for part, told in claim["variants"][variant].items() if part != "trials"}


def best(tried: Sequence[Row]) -> dict[str, Row]:
    """The trial of each variant with the lowest validation loss; one that diverged loses."""
    found: dict[str, Row] = {}
    for row in sorted(tried, key=lambda row: (math.isnan(row["validation"]), row["validation"])):
        found.setdefault(row["variant"], row["trial"])
    return found


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
    tuned = claim.get("tuning")
    out = [
        f"Recipe `{claim['recipe']}` as in `paper/{claim['name']}.toml`, seeds {seeds}; "
        f"{first['hardware']}, {first['precision']}. Test perplexity (token level), mean over "
        f"clients, then over seeds; differences with their 95 % interval (Student's t over seeds, "
        "paired); bytes, and per cent of the reference's. "
        f"Target: the validation loss of `{claim['reference']}` after its last round, and "
        f"{claim['within']:.0%} of perplexity more; a dash where some seed does not reach it.",
    ]
    if tuned:
        out[0] += (
            f" Each variant has the best of {len(tuned['trials'])} trials by validation loss, on "
            f"seed {tuned['seed']} and {tuned['division']}."
        )
    for division in dict.fromkeys(row["division"] for row in rows):
        own = [row for row in rows if row["division"] == division]
        out += ["", *([f"**{division}**", ""] if division else []), *_division(claim, rows, own)]
    return "\n".join(out) + "\n"


def _division(claim: Row, rows: Sequence[Row], own: Sequence[Row]) -> list[str]:
    tuned = ["chosen"] if claim.get("tuning") else []
    heads = [
        "variant",
        *tuned,
        "perplexity",
        f"less `{claim['reference']}`",
        "uplink",
        "downlink",
        "saved of full-model FedAvg's uplink",
        *(f"{what} to target" for what in ("uplink", "downlink", "rounds")),
    ]
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = _by_seed(own, claim["reference"])
    whole = {k: _mean(own, claim["reference"], k) for k in ("bytes_up", "bytes_down")}
    for variant in dict.fromkeys(row["variant"] for row in own):
        mine = [row for row in own if row["variant"] == variant]
        found = _by_seed(own, variant)
        apart = "" if variant == claim["reference"] else _apart(found, base)
        sent = {k: _mean(own, variant, k) for k in whole}
        saved = 1 - sent["bytes_up"] / _mean(own, variant, "bytes_full")
        when = [reached(row, target(claim, rows, row)) for row in mine]
        there = [w for w in when if w]
        all_there = len(there) == len(when)
        cells = [
            variant,
            *(f"`{worded(mine[0]['chosen'])}`" for _ in tuned),
            f"{fmean(found.values()):.2f}",
            apart,
            *(f"{size(sent[k])} ({100 * sent[k] / whole[k]:.1f} %)" for k in whole),
            f"{100 * saved:.2f} %",
            *(size(fmean(w[k] for w in there)) if all_there else "-" for k in ("up", "down")),
            f"{fmean(w['round'] for w in there):.1f}" if all_there else "-",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return out


def _mean(rows: Sequence[Row], variant: str, key: str) -> float:
    return fmean(row[key] for row in rows if row["variant"] == variant)


def worded(trial: Row) -> str:
    """Overrides as a command line has them."""
    return ", ".join(f"{p}.{k}={v:g}" for p, held in trial.items() for k, v in held.items())


def _by_seed(rows: Sequence[Row], variant: str) -> dict[int, float]:
    return {row["seed"]: row["test"]["global"] for row in rows if row["variant"] == variant}


def _apart(found: dict[int, float], base: dict[int, float]) -> str:
    mean, low, high = paired_interval([found[s] - base[s] for s in base])
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def ran(claim: Row, case: Case, path: Path, runs: Path) -> Row:
    """The record of one case, which is run if it has not been."""
    own = {**claim, "overrides": merged(claim.get("overrides", {}), case.overrides)}
    settings = settings_of(own, path.parent.parent)
    settings = replace(settings, federation=replace(settings.federation, seed=case.seed))
    name = "-".join(filter(None, (claim["name"], case.division, case.variant, str(case.seed))))
    row = record(settings, runs / name.replace(" ", "_"))
    return {"division": case.division, "variant": case.variant, "seed": case.seed, **row}


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
    out = RESULTS / f"{claim['name']}.jsonl"
    if not told.table_only:
        steady_allocations()
        here = {
            part: {"path": path}
            for part, path in (("data", told.data), ("backbone", told.backbone))
            if path
        }
        claim["overrides"] = merged(claim.get("overrides", {}), here)
        if told.only:
            claim["variants"] = {told.only: claim["variants"][told.only]}
        tried = [
            {"trial": trial, "validation": row["way"][-1][3], **row}
            for case, trial in (trials(claim) if "tuning" in claim else ())
            for row in (ran(claim, case, told.claim, told.runs),)
        ]
        chosen = best(tried)
        made = [
            {"chosen": chosen.get(case.variant, {}), **ran(claim, case, told.claim, told.runs)}
            for case in cases(claim, chosen)
        ]
        if told.only is None:
            write_lines(out, made)
        if tried and told.only is None:
            write_lines(out.with_name(f"{claim['name']}-trials.jsonl"), tried)
    if told.only is None:
        rows = lines(out)
        out.with_suffix(".md").write_text(table(claim, rows))
        print(table(claim, rows))


if __name__ == "__main__":
    main()
