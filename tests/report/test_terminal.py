import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fedgen_edge.report.diagnose import Finding, diagnose
from fedgen_edge.report.summary import RunFiles, read
from fedgen_edge.report.terminal import (
    list_findings,
    show,
    tabulate_clients,
    tabulate_gains,
    tabulate_models,
)
from fedgen_edge.tasks.language.task import MEASURE
from support.reports import BITS, CLIENTS, make_run

TABLES = (tabulate_models, tabulate_clients, tabulate_gains)
METHODS = ("fedavg-full", "fedprox", "centralised", "fedper", "fedadam", "ffa-lora", "ditto")


def lines_of(table: Table, width: int) -> list[str]:
    """What a terminal of this width shows."""
    file = io.StringIO()
    Console(width=width, file=file, markup=False, highlight=False).print(table)
    return file.getvalue().splitlines()


def many(folder: Path, clients: int, methods: Sequence[str] = METHODS) -> RunFiles:
    """A run of many clients, the last new; each perplexity is 2^BITS, of the methods 16.

    Of the first client the personal one is 64.
    """
    make_run(folder)
    names = [f"[red]a-rather-long-client-name-{i}" for i in range(clients)]
    bits = {**BITS, **dict.fromkeys(methods, 4)}
    rows = [
        {
            "model": model,
            "client": c,
            "total": 100 * (6 if (model, c) == ("personal", names[0]) else n) * math.log(2),
            "count": 100,
            "words": 50,
        }
        for model, n in bits.items()
        for c in names
    ]
    told = [{"client": c, "train": 9, "items": 900, "newcomer": c == names[-1]} for c in names]
    (folder / "clients.json").write_text(json.dumps(told))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(folder)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_the_terminal_and_cut_no_models_name(tmp_path: Path, width: int) -> None:
    run = many(tmp_path / "run", 15)
    for table in TABLES:
        assert max(map(len, lines_of(table(run, width), width))) <= width
    lines = lines_of(tabulate_models(run, width), width)
    for model in (*BITS, *METHODS):
        rows = 1 if model == "local-only" else 2  # newcomers have none that they trained alone
        assert sum(line.split()[:1] == [model] for line in lines) == rows


def test_methods_are_rows_with_mean_worst_and_how_many_gain(tmp_path: Path) -> None:
    # Of 14, one has 64 and 13 have 8: mean 12. Over 64, 13 gain 87.5 %, one nothing: 81.25 % mean.
    # Over 32, 13 gain 75 %, one loses 100 %: 62.5 % mean.
    lines = lines_of(tabulate_models(many(tmp_path / "run", 15), 80), 80)
    assert "mean of 14" in next(line for line in lines if "worst" in line)
    row = next(line.split() for line in lines if line.split()[:1] == ["personal"])
    assert row == ["personal", "12.0", "64.0", "+81.2", "%", "13/14", "+62.5", "%", "13/14"]
    new = next(line.split() for line in lines if line.split()[:2] == ["personal", "(new)"])
    assert new == ["personal", "(new)", "8.00", "8.00", "+87.5", "%", "1/1"]


def test_of_many_clients_the_worst_have_a_row_and_the_others_are_counted(tmp_path: Path) -> None:
    lines = lines_of(tabulate_clients(many(tmp_path / "run", 51), 80), 80)
    rows = [line for line in lines if "[red]a-ra" in line]
    assert len(rows) == 12
    assert rows[0].split()[1:] == ["64.0", "32.0", "16.0", "64.0"]
    assert any("and 39 more in the report" in line for line in lines)
    assert any("The 12 clients of highest perplexity (personal)" in line for line in lines)


def test_a_dozen_clients_stand_in_their_own_order(tmp_path: Path) -> None:
    lines = lines_of(tabulate_clients(read(make_run(tmp_path / "run")), 80), 80)
    rows = [line.split() for line in lines if "64.0" in line]
    assert [row[-4:] for row in rows] == [["64.0", "32.0", "16.0", "8.00"]] * 3
    assert rows[0][:3] == ["a", "&", "b"]
    assert not any("more in the report" in line for line in lines)


def test_the_terminal_tells_gains_in_80_columns(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    told = [{**row, "participated": row["client"] != CLIENTS[0]} for row in rows]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    lines = lines_of(tabulate_gains(read(folder), 80), 80)
    # 8 for 32, 75 % less
    found = next(line.split() for line in lines if "personal over local-only" in line)
    assert found[3:] == ["2", "+75.0", "+75.0", "100", "%", "0", "%"]
    assert sum("(new)" in line for line in lines) == 3
    assert len({line.index("%") for line in lines if "personal" in line}) == 1


def test_a_clients_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    lines = lines_of(tabulate_clients(read(make_run(tmp_path / "run")), 80), 80)
    assert any("日本??" in line for line in lines)


def test_a_run_that_has_only_begun_has_empty_tables(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"measure": MEASURE}))
    assert [table(read(tmp_path), 80).row_count for table in TABLES] == [0, 0, 0]


def test_findings_are_lines_and_the_gravest_say_what_to_do() -> None:
    found = [Finding("warning", "Slow", "10 s.", "Wait."), Finding("note", "Odd", "3.", "Look.")]
    text = [line.rstrip() for line in lines_of(list_findings(found), 80)]
    assert text == ["WARNING  Slow: 10 s. Wait.", "NOTE     Odd: 3."]
    lines = lines_of(list_findings(found * 5), 80)
    assert lines[-1].strip() == "and 4 more in the report"
    assert len(lines) == 7


def test_a_finished_run_prints_its_findings_and_no_line_is_broken_where_nobody_watches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = many(tmp_path / "run", 51)
    run = replace(
        run, personal=[{**row, "folder": f"c{at}"} for at, row in enumerate(run.personal)]
    )
    show(run, tmp_path / "report.html")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for finding in diagnose(run):
        assert any(f"{finding.title}: {finding.evidence}" in line for line in lines)
    assert any(line.startswith("51 clients, 3 rounds") and "less." in line for line in lines)
    assert f"report    {tmp_path / 'report.html'}" in lines
    assert f"adapter   {tmp_path / 'run' / 'adapters' / 'clients' / 'c2'}" in lines
