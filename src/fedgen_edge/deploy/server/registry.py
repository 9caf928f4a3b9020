"""The sites of a run: their numbers, and what each said when it joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgen_edge.runs import records

Row = dict[str, Any]
COUNTS = ("train", "validation", "test", "items")
"""What a site says when it joins, beside its weight: examples of each split, and training items."""


@dataclass
class SiteRegistry:
    """Who belongs to a run; a site keeps its number, whoever comes or goes."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    """Of each site, in the order of numbers: its name, and its weight and counts once it joined."""

    @property
    def names(self) -> list[str]:
        """By number."""
        return [row["client"] for row in self.rows]

    def numbers(self) -> dict[str, int]:
        """By name."""
        return {row["client"]: number for number, row in enumerate(self.rows)}

    def weights(self) -> dict[str, int]:
        """Training examples of those that have joined, by name."""
        return {row["client"]: row["weight"] for row in self.rows if "weight" in row}

    def enroll(self, names: Sequence[str]) -> None:
        """Give numbers to those that have none: after all others, in the order of their names."""
        new = sorted(set(names) - set(self.names))
        if new:
            self.rows += [{"client": name} for name in new]
            self._write()

    def record_join(self, name: str, weight: int, counts: Mapping[str, int]) -> None:
        """Keep what a site said."""
        number = self.numbers()[name]
        self.rows[number] = {"client": name, "weight": weight, **counts}
        self._write()

    def write_client_records(self, run: Path) -> None:
        """Write `clients.json` as a run on one machine has it; of labels a site says nothing."""
        cohort_members = records.list_cohort_members(run)
        client_records = [
            {**row, "newcomer": row["client"] not in cohort_members, "labels": {}}
            for row in self.rows
            if "weight" in row
        ]
        records.write_json(run / "clients.json", client_records)

    def _write(self) -> None:
        records.write_json(self.path, self.rows)


def open_registry(path: Path) -> SiteRegistry:
    """The roll of a run, new or as it was left."""
    return SiteRegistry(path, records.read_json(path) if path.exists() else [])
