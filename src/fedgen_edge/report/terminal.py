"""Print a finished run: its models, its clients, its findings, and its paths.

Tables are at most as wide as the terminal: the least important column is dropped first. If the
output is not a terminal, lines have any length.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedgen_edge.report.diagnose import Finding, diagnose
from fedgen_edge.report.gains import (
    ClientRow,
    Gain,
    format_signed,
    gains,
    gains_over,
    make_client_rows,
)
from fedgen_edge.report.page import headline
from fedgen_edge.report.summary import (
    BACKBONE,
    GLOBAL,
    LOCAL,
    PERSONAL,
    ModelRow,
    Number,
    RunFiles,
    by_model,
    summarize_models,
)
from fedgen_edge.runs.formatting import number, printable
from fedgen_edge.runs.progress import Cell, fit

CLIENTS = 12
"""Maximum clients with a row and a printed adapter path."""
FINDINGS = 6
WIDEST_NAME = 20
UNLIMITED = 10_000
"""Characters in a line if the output is not a terminal."""
EDGE, BETWEEN = 2, 3
"""Characters at the ends of a table's row, and between two cells."""
STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan", "good": "green"}


@dataclass(frozen=True)
class Column:
    """A column of a table, its header first."""

    rank: int
    """The column of the highest rank is dropped first."""
    header: str
    cells: Sequence[Text]

    @property
    def width(self) -> int:
        """Characters of its longest cell."""
        return max(len(self.header), *(cell.cell_len for cell in self.cells), 0)


def show(run: RunFiles, page: Path) -> None:
    """Print a finished run: tables, a summary, findings and paths."""
    interactive = sys.stdout.isatty()
    console = Console(width=None if interactive else UNLIMITED, markup=False, highlight=False)
    for table in (tabulate_models, tabulate_clients, tabulate_gains):
        if (drawn := table(run, console.width)).row_count:
            console.print(drawn)
    console.print(headline(run))
    console.print()
    console.print(list_findings(diagnose(run)))
    for line in list_paths(run, page):
        console.print(line, soft_wrap=True)


def tabulate_models(run: RunFiles, width: int) -> Table:
    """Tabulate the test, a row per model, over participants; then over held-out clients."""
    rows = [(row, new) for new in (False, True) for row in summarize_models(run, newcomers=new)]
    over = {
        (reference, new): gains_over(run, reference, new)
        for reference in (BACKBONE, LOCAL)
        for new in (False, True)
    }
    columns = [
        Column(0, "model", [Text(row.model + " (new)" * new) for row, new in rows]),
        Column(1, _mean_header(rows), _lowest([row.mean for row, _ in rows])),
        Column(2, "worst", [Text(number(row.worst)) for row, _ in rows]),
        Column(5, "worst client", [_name(row.worst_client) for row, _ in rows]),
        *(
            Column(rank, f"over {reference}", cells)
            for rank, reference in ((3, BACKBONE), (4, LOCAL))
            if any(cells := [_gain(over[reference, new].get(row.model)) for row, new in rows])
        ),
    ]
    title = f"Test {run.measure.name} (lower is better); gains, and how many clients gain"
    return lay_out(title, columns, width)


def _mean_header(rows: Sequence[tuple[ModelRow, bool]]) -> str:
    return f"mean of {rows[0][0].clients}" if rows and not rows[0][1] else "mean"


def _gain(gain: Gain | None) -> Text:
    """Format the mean client's gain in percent, and how many clients gain."""
    if gain is None:
        return Text()
    better = round(gain.share_gained * len(gain.gain_by_client))
    return Text(f"{format_signed(gain.mean)} %  {better}/{len(gain.gain_by_client)}")


def tabulate_clients(run: RunFiles, width: int) -> Table:
    """Tabulate each client's test with its own models; of many clients, the worst."""
    rows = make_client_rows(run)
    models = [m for m in by_model(run) if m in {BACKBONE, LOCAL, GLOBAL, PERSONAL}]
    shown = _worst(rows, models[-1]) if len(rows) > CLIENTS and models else rows
    rank = {PERSONAL: 1, GLOBAL: 2, BACKBONE: 3, LOCAL: 4}
    cells = [_lowest([row.test_results.get(m, math.nan) for m in models]) for row in shown]
    columns = [
        Column(0, "client", [_name(row.client, row.newcomer) for row in shown]),
        *(Column(rank[m], m, [own[at] for own in cells]) for at, m in enumerate(models)),
    ]
    table = lay_out("Each client", columns if models else [], width)
    if more := len(rows) - len(shown):
        table.title = f"The {len(shown)} clients of highest {run.measure.name} ({models[-1]})"
        table.caption = f"and {more} more in the report"
    return table


def _worst(rows: Sequence[ClientRow], model: str) -> list[ClientRow]:
    tested = [row for row in rows if model in row.test_results]
    return sorted(tested, key=lambda row: row.test_results[model], reverse=True)[:CLIENTS]


def tabulate_gains(run: RunFiles, width: int) -> Table:
    """Tabulate the distribution of gains over clients; without rows if nothing is compared."""
    rows = gains(run)
    names = [f"{g.model} over {g.reference}" + " (new)" * g.newcomers for g in rows]
    columns = [
        Column(0, "", [Text(name) for name in names]),
        Column(5, "clients", [Text(str(len(g.gain_by_client))) for g in rows]),
        Column(1, "mean", [Text(format_signed(g.mean)) for g in rows]),
        Column(3, "worst tenth", [Text(format_signed(g.worst_decile)) for g in rows]),
        Column(2, "gained", [Text(f"{100 * g.share_gained:.0f} %") for g in rows]),
        Column(4, "lost", [Text(f"{100 * g.share_lost:.0f} %") for g in rows]),
    ]
    return lay_out("Gain of each client, %", columns, width)


def lay_out(title: str, columns: Sequence[Column], width: int) -> Table:
    """Make a table of the columns that fit; the first holds names."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    room = [Cell(column.rank, " " * column.width) for column in columns]
    visible_ranks = {cell.rank for cell in fit(room, width - EDGE, BETWEEN)}
    shown = [column for column in columns if column.rank in visible_ranks]
    for at, column in enumerate(shown):
        table.add_column(column.header, justify="right" if at else "left", no_wrap=True)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*row)
    return table


def list_findings(findings: Sequence[Finding]) -> Table:
    """Tabulate the findings, the worst first, and what to do about them."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings[:FINDINGS]:
        text = f"{finding.title}: {finding.evidence}"
        grave = finding.severity in {"problem", "warning"}
        label = Text(finding.severity.upper(), STYLES[finding.severity])
        table.add_row(label, f"{text} {finding.advice}" if grave else text)
    if more := len(findings[FINDINGS:]):
        table.add_row("", f"and {more} more in the report")
    return table


def list_paths(run: RunFiles, page: Path) -> list[str]:
    """List the paths of the report and of the clients' adapters."""
    folder = run.folder / "adapters" / "clients"
    lines = [f"report    {page}"]
    lines += [f"adapter   {folder / own['folder']}" for own in run.personal[:CLIENTS]]
    more = len(run.personal[CLIENTS:])
    return [*lines, f"          and {more} more in {folder}"] if more else lines


def _name(client: str, newcomer: bool = False) -> Text:
    """Shorten a client's name in its middle, since names often differ at the end."""
    shown, half = printable(client), WIDEST_NAME // 2
    if len(shown) > WIDEST_NAME:
        shown = f"{shown[: half - 1]}\N{HORIZONTAL ELLIPSIS}{shown[-half:]}"
    text = Text(shown)
    text.truncate(WIDEST_NAME, overflow="ellipsis")
    return text + Text(" (new)" * newcomer)


def _lowest(values: Sequence[Number]) -> list[Text]:
    low = min((value for value in values if not math.isnan(value)), default=0.0)
    return [Text(number(value), "green" if value == low else "") for value in values]
