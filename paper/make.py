"""Rebuild the paper's tables and figures: run what is missing, keep its records, fill the pages.

    python paper/make.py
    python paper/make.py rank-ptb skew-ptb --scale full --data FOLDER

An item is a file in `paper/items`. What has a record in `paper/results/ITEM-SCALE.jsonl` is not run
again, and what was stopped goes on where it was.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import fill
import kept
from fedgen_edge.config import Settings
from fedgen_edge.errors import FedGenError, TrainingError
from fedgen_edge.runs.records import folder_name, lock_run
from items import (
    ITEMS,
    Case,
    Places,
    Row,
    backbones,
    cases,
    check_paths,
    list_items,
    read,
    settings_of,
    trials,
    tunes,
    tunings,
)
from pool import workers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("items", nargs="*", help="none is all")
    parser.add_argument("--scale", default="small", help="small or full")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--jobs", type=int, help="runs at once; none is a core each, or 1 of full")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--discard", action="store_true", help="runs whose record is kept")
    parser.add_argument("--from", dest="folder", type=Path, default=ITEMS, help="of the items")
    parser.add_argument("--results", type=Path, default=kept.RESULTS, help="folder of the records")
    return parser.parse_args()


def make(options: argparse.Namespace) -> None:
    """Every item, one after the other; then the pages.

    Raises:
        FedGenError: an item cannot be carried out, or some of its runs failed.
    """
    items_to_make = [
        read(name, options.scale, options.folder)
        for name in options.items or list_items(options.folder)
    ]
    for item in items_to_make:
        check_paths(item, options.data)
    jobs = options.jobs or (1 if options.scale == "full" else len(os.sched_getaffinity(0)))
    options.runs.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with lock_run(options.runs):
        for item in items_to_make:
            with workers(min(jobs, item.get("jobs", jobs))) as pool:
                failed += carry_out_item(item, options, pool)
    if failed:
        raise TrainingError("; ".join(failed))
    if options.results == kept.RESULTS and options.folder == ITEMS:
        fill.main()


def carry_out_item(item: Row, options: argparse.Namespace, pool: Executor) -> list[str]:
    """Run what is missing of an item: its backbones, its trials, and then what they chose.

    Trials of tuning come after the others, which they rest on.

    Returns:
        A line for each run that failed.
    """
    failed = prepare(item, options, pool) or carry_out(item, list(trials(item)), options, pool)
    if not failed and (then := list(tunings(item, kept.choose_shared(item, options.results)))):
        failed = carry_out(item, then, options, pool)
    if failed:
        return failed
    return carry_out(item, list(cases(item, kept.choose(item, options.results))), options, pool)


def places(options: argparse.Namespace) -> Places:
    return Places(options.data, options.runs / "backbones")


def prepare(item: Row, options: argparse.Namespace, pool: Executor) -> list[str]:
    """Make the backbones that are missing; returns a line for each that failed."""
    left = {out: own for out, own in backbones(item, places(options)).items() if not out.exists()}
    failed: list[str] = []
    while left and not failed:  # some are trained on from others
        ready = [out for out, own in left.items() if Path(own.backbone.path) not in left]
        begun = [pool.submit(pretrain_backbone, left.pop(out), out) for out in ready]
        failed = sorted(filter(None, (future.result() for future in as_completed(begun))))
    return failed


def pretrain_backbone(settings: Settings, out: Path) -> str:
    """Make a backbone, or go on with it; returns why it failed, if it did."""
    from fedgen_edge.runs.pretrain import begin, get_training_folder, train

    if not (get_training_folder(out) / "planned.toml").exists():  # stopped before it began
        shutil.rmtree(get_training_folder(out), ignore_errors=True)
    try:
        for _ in train(begin(settings, out), out):
            pass
    except FedGenError as error:
        return f"backbone {out.name}: {error}"
    shutil.rmtree(get_training_folder(out))
    return ""


def carry_out(
    item: Row, planned: Sequence[Case], options: argparse.Namespace, pool: Executor
) -> list[str]:
    """Run the cases that have no record; returns a line for each that failed."""
    left, failed, at = kept.find_missing(item, planned, options.results), [], places(options)
    begun = {
        pool.submit(work, settings_of(item, case, at), _folder(item, case, options.runs)): case
        for case in reversed(left)  # the last values mostly cost most: no core waits long
    }
    for number, future in enumerate(as_completed(begun), len(planned) - len(left) + 1):
        case, (row, folder) = begun[future], future.result()
        spent = row.pop("spent")
        print(
            f"{item['name']} {item['scale']}: {number} of {len(planned)}, {case}, {spent:.0f} s",
            flush=True,
        )
        if "failed" in row and not (case.trial is not None and row["diverged"]):
            failed.append(f"{item['name']}, {case}: {row['failed']}")
            continue
        kept.add(item, {**kept.facts_of(item, case), **_select_shown(case, row)}, options.results)
        if options.discard:
            shutil.rmtree(folder, ignore_errors=True)  # one that failed may have none
    return sorted(failed)


def work(settings: Settings, folder: Path) -> tuple[Row, Path]:
    """A run's record, or why there is none, and its folder."""
    from running import folder_of, proceed_run, record

    folder, began = folder_of(settings, folder), time.perf_counter()
    try:
        for _ in proceed_run(settings, folder):
            pass
        row = record(folder)
    except FedGenError as error:
        row = {"failed": str(error), "diverged": isinstance(error, TrainingError)}
    return {**row, "spent": time.perf_counter() - began}, folder


def _folder(item: Row, case: Case, runs: Path) -> Path:
    return runs / folder_name(f"{item['records']}-{item['scale']}-{case}")


def _select_shown(case: Case, row: Row) -> Row:
    """Of a trial, what it is judged by: no test is looked at before the choice is made."""
    if case.trial is None:
        return row
    if "failed" in row:
        return {"failed": row["failed"], "validation": None}
    facts = {key: row[key] for key in ("hardware", "precision", "versions", "seconds")}
    return {**facts, "validation": row["tuned"] if tunes(case.trial) else row["way"][-1][-1]}


def main() -> None:
    """Make what is asked for; a user's mistake is one line, and Ctrl-C loses nothing."""
    try:
        make(arguments())
    except (FedGenError, OSError) as error:
        print(f"paper: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        print("paper: a process was lost, perhaps for memory: give fewer --jobs", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("paper: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
