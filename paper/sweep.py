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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import running
from cells import reached
from fedgen_edge.experiments.records import lines, write_lines
from fedgen_edge.experiments.summary import paired_interval, size
from fedgen_edge.machine import steady_allocations
from items import Case, Row, best, cases, merged, of_recipe, trials, worded
from kept import RESULTS


def target(claim: Row, rows: Sequence[Row], row: Row) -> float:
    """The validation loss that counts as the reference's, of the same division and seed."""
    (last,) = [
        own["way"][-1][-1]
        for own in rows
        if own["variant"] == claim["reference"]
        and (own["division"], own["seed"]) == (row["division"], row["seed"])
    ]
    return last + math.log1p(claim["within"])


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


def _by_seed(rows: Sequence[Row], variant: str) -> dict[int, float]:
    return {row["seed"]: row["test"]["global"] for row in rows if row["variant"] == variant}


def _apart(found: dict[int, float], base: dict[int, float]) -> str:
    mean, low, high = paired_interval([found[s] - base[s] for s in base])
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def ran(claim: Row, case: Case, path: Path, runs: Path) -> Row:
    """The record of one case, which is run if it has not been."""
    own = {**claim, "overrides": merged(claim.get("overrides", {}), case.overrides)}
    settings = of_recipe(own, path.parent.parent)
    settings = replace(settings, federation=replace(settings.federation, seed=case.seed))
    name = "-".join(filter(None, (claim["name"], case.division, case.variant, str(case.seed))))
    row = running.record(running.finished(settings, runs / name.replace(" ", "_")))
    test = {model: found["mean"] for model, found in row["test"].items()}
    facts = {"division": case.division, "variant": case.variant, "seed": case.seed}
    return {**facts, **row, "test": test}


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
            {"trial": case.trial, "validation": row["way"][-1][-1], **row}
            for case in trials(claim)
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
