"""The records of an item: added as runs end, and refused where its file says something else now."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgen_edge.config import to_table
from fedgen_edge.errors import ConfigError
from fedgen_edge.runs.records import lines, write_lines
from items import ROOT, Case, Row, best, cases, digest, key_of, merge, settings_of, trials, tunings

RESULTS = ROOT / "paper" / "results"


def path_of(item: Row, results: Path = RESULTS) -> Path:
    """Where an item's records lie."""
    return results / f"{item['records']}-{item['scale']}.jsonl"


def facts_of(item: Row, case: Case) -> Row:
    """What a record says of its case."""
    tried = {"chosen": case.chosen} if case.trial is None else {"trial": case.trial}
    own = {"division": case.division, "variant": case.variant, "seed": case.seed, **tried}
    return {"item": item["records"], "scale": item["scale"], **own, "digest": digest(item, case)}


def find_missing(item: Row, planned: Sequence[Case], results: Path = RESULTS) -> list[Case]:
    """The cases that no record is of, or one of other settings."""
    rows = _by_key(path_of(item, results))
    return [case for case in planned if _wrong(item, case, rows.get(_key(case)))]


def add(item: Row, row: Row, results: Path = RESULTS) -> None:
    """Keep a record, in the place that the item's file gives it; in one step."""
    path = path_of(item, results)
    rows = {**_by_key(path), _row_key(row): row}
    order = _list_keys(item)
    known = {key: rows[key] for key in order if key in rows}
    write_lines(path, {**known, **rows}.values())  # others are of a file that was changed since


def choose_shared(item: Row, results: Path = RESULTS) -> dict[str, Row]:
    """What each variant's trials chose by the shared model."""
    rows = _by_key(path_of(item, results))
    return best([rows[_key(case)] for case in trials(item)])


def choose(item: Row, results: Path = RESULTS) -> dict[str, Row]:
    """What each variant's trials chose, those of tuning too."""
    rows, first = _by_key(path_of(item, results)), choose_shared(item, results)
    then = best([rows[_key(case)] for case in tunings(item, first)])
    return {variant: merge(own, then.get(variant, {})) for variant, own in first.items()}


def _list_keys(item: Row) -> list[str]:
    """Keys of all that an item's file asks for, in its order."""
    return [_key(case) for case in (*cases(item, {}), *trials(item), *tunings(item, {}))]


def read_whole(item: Row, results: Path = RESULTS) -> list[Row]:
    """An item's records but for its trials', each with its line in the file.

    Raises:
        FileNotFoundError: there is none yet.
        ConfigError: one is missing, of another scale, of other settings than the item's file says
            now, of other data or of another backbone than one with the same settings of these, or
            of nothing that the file says.
    """
    path = path_of(item, results)
    if not path.exists():
        raise FileNotFoundError(path)
    for planned in (trials(item), _tunings(item, results), _cases(item, results)):
        _check(item, planned, path)  # each asks what those before it chose, and is asked after them
    known = {*_list_keys(item)}
    rows = [{**row, "line": number} for number, row in enumerate(lines(path), 1)]
    for row in rows:
        if _row_key(row) not in known:
            raise ConfigError(
                f"{path.name}, line {row['line']}: the item's file has no {_row_key(row)} any "
                "more: delete that line"
            )
    found = [row for row in rows if "trial" not in row]
    _check_alike(item, found, results)
    return found


def _tunings(item: Row, results: Path) -> Iterator[Case]:
    yield from tunings(item, choose_shared(item, results))


def _cases(item: Row, results: Path) -> Iterator[Case]:
    yield from cases(item, choose(item, results))


def _check(item: Row, planned: Iterator[Case], path: Path) -> None:
    rows = _by_key(path)
    for case in planned:
        if wrong := _wrong(item, case, rows.get(_key(case))):
            again = f"make paper ITEMS={item['records']} SCALE={item['scale']}"
            raise ConfigError(f"{path.name}: the record of {case} {wrong}: run `{again}`")


HELD = {"data_sha256": ("data", "partition", "federation"), "backbone_sha256": ("backbone",)}
"""What a record has of all that its run held, and the settings that decide it."""


def _check_alike(item: Row, rows: Sequence[Row], results: Path) -> None:
    """Refuse records whose data or backbones differ where their settings do not."""
    of_key = {_row_key(row): row for row in rows}
    tables = {_key(case): to_table(settings_of(item, case)) for case in _cases(item, results)}
    for what, parts in HELD.items():
        seen: dict[str, Row] = {}
        for key, told in tables.items():
            row = of_key[key]
            first = seen.setdefault(json.dumps([told[part] for part in parts]), row)
            if row.get(what) != first.get(what):  # records of before have neither
                raise ConfigError(
                    f"{path_of(item, results).name}, lines {first['line']} and {row['line']}: "
                    f"{what} differs, and the settings do not: delete what is of older files, and "
                    f"run `make paper ITEMS={item['records']} SCALE={item['scale']}`"
                )


def _wrong(item: Row, case: Case, row: Row | None) -> str:
    if row is None:
        return "is missing"
    if row["scale"] != item["scale"]:
        return f"is of scale {row['scale']!r}"
    if row["digest"] != digest(item, case):
        return "is of other settings than the item's file says now"
    return ""


def _by_key(path: Path) -> dict[str, Row]:
    return {_row_key(row): row for row in lines(path)}


def _key(case: Case) -> str:
    return key_of(case.division, case.variant, case.seed, case.trial)


def _row_key(row: Row) -> str:
    return key_of(row["division"], row["variant"], row["seed"], row.get("trial"))
