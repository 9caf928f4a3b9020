import json
import math
from pathlib import Path

import pytest
from scipy import stats

from fedgen_edge.errors import CheckpointError
from fedgen_edge.report.summary import (
    paired_interval,
    read,
    summarize_models,
    uplink,
    validation,
)
from fedgen_edge.runs.formatting import number, size
from fedgen_edge.tasks.language.task import MEASURE

LN2 = math.log(2)
BITS = {"backbone": (2, 4, 1), "local-only": (1, 3, 1), "global": (1, 3, 9), "personal": (1, 2, 9)}


def on_test(model: str, client: str, bits: int) -> dict[str, object]:
    """Ten tokens in five words, each token `bits` bits: a perplexity of 2^bits."""
    return {"model": model, "client": client, "total": 10 * bits * LN2, "count": 10, "words": 5}


TRAINED = {"steps": 3, "weight": 7.0, "bytes_up": 100, "drift": 0.5}


def a_round(number: int, bits: float) -> dict[str, object]:
    return {
        "round": number,
        "cohort": ["a", "b"],
        "loss": bits * LN2,
        "validation": {"total": 100 * bits * LN2, "count": 100, "words": 50, "clients": {}},
        "bytes_up": 200,
        "bytes_down": 220,
        "clients": [{"client": c, **TRAINED, "loss": bits * LN2} for c in "ab"],
    }


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clients a and b, and a newcomer c, for whom local-only is the backbone."""
    rows = [on_test(m, c, n) for m, each in BITS.items() for c, n in zip("abc", each, strict=True)]
    clients = [{"client": c, "train": 7, "items": 70, "newcomer": c == "c"} for c in "abc"]
    (tmp_path / "settings.toml").write_text('task = "language"\n[federation]\nseed = 3\n')
    facts = {"full_bytes": 10000, "finished": True, "measure": MEASURE}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "clients.json").write_text(json.dumps(clients))
    (tmp_path / "rounds.jsonl").write_text(lines([a_round(1, 3), a_round(2, 2)]))
    (tmp_path / "evaluation.jsonl").write_text(lines(rows))
    return tmp_path


def test_settings_are_read_by_dotted_name(folder: Path) -> None:
    assert read(folder).settings == {"task": "language", "federation.seed": 3}


def test_pooled_perplexity_is_exp_of_a_sum_over_a_sum(folder: Path) -> None:
    # Personal: a 2^1, b 2^2. Mean 3, worst 4; pooled 2^1.5; 3 * 10 bits over 10 words are 2^3.
    row = next(row for row in summarize_models(read(folder)) if row.model == "personal")
    assert row.mean == pytest.approx(3)
    assert row.pooled == pytest.approx(2**1.5)
    assert (row.worst_client, row.worst) == ("b", pytest.approx(4))
    assert row.worst_decile == pytest.approx(4)
    assert row.word == pytest.approx(8)


@pytest.mark.parametrize(("tokens", "says"), [(20, True), (21, False)])
def test_words_of_more_than_four_tokens_have_no_number(
    folder: Path, tokens: int, says: bool
) -> None:
    # four tokens of 4 bits a word are 16 bits
    row = {**on_test("global", "a", 4), "count": tokens, "words": 5, "total": tokens * 4 * LN2}
    (folder / "evaluation.jsonl").write_text(lines([row]))
    (model,) = summarize_models(read(folder))
    assert model.mean == pytest.approx(16)
    assert model.word == pytest.approx(2**16 if says else math.nan, nan_ok=True)


def test_gains_are_percent_of_the_references_mean(folder: Path) -> None:
    # Backbone (4 + 16) / 2 = 10, local-only (2 + 8) / 2 = 5, personal 3: 70 % and 40 % lower.
    rows = {row.model: row for row in summarize_models(read(folder))}
    assert rows["personal"].over_backbone == pytest.approx(70)
    assert rows["personal"].over_local == pytest.approx(40)
    assert rows["backbone"].over_local == pytest.approx(-100)
    assert math.isnan(rows["backbone"].over_backbone)


def test_newcomers_have_means_of_their_own(folder: Path) -> None:
    run = read(folder)
    assert {row.model: row.clients for row in summarize_models(run)} == dict.fromkeys(BITS, 2)
    new = summarize_models(run, newcomers=True)
    assert {row.model: (row.clients, row.mean) for row in new} == {
        m: (1, pytest.approx(2 ** bits[2])) for m, bits in BITS.items() if m != "local-only"
    }
    assert all(math.isnan(row.over_local) for row in new)


def test_models_are_compared_on_the_clients_that_all_were_tested_on(folder: Path) -> None:
    rows = [on_test("global", "a", 1), on_test("global", "b", 5), on_test("backbone", "a", 2)]
    (folder / "evaluation.jsonl").write_text(lines(rows))
    found = [(row.model, row.mean) for row in summarize_models(read(folder))]
    assert found == [("backbone", pytest.approx(4)), ("global", pytest.approx(2))]


def test_worst_decile_is_the_mean_of_the_worst_tenth_rounded_up(folder: Path) -> None:
    # Of 11 clients with 1 to 11 bits, the worst two have 2^11 and 2^10: 1536 on average.
    rows = [on_test("global", f"c{bits}", bits) for bits in range(1, 12)]
    (folder / "evaluation.jsonl").write_text(lines(rows))
    assert summarize_models(read(folder))[0].worst_decile == pytest.approx(1536)


def test_a_client_with_a_broken_model_is_the_worst(folder: Path) -> None:
    broken = {**on_test("global", "b", 1), "total": math.nan}
    (folder / "evaluation.jsonl").write_text(lines([on_test("global", "a", 5), broken]))
    assert summarize_models(read(folder))[0].worst_client == "b"


def test_saving_is_measured_against_the_whole_model_for_every_upload(folder: Path) -> None:
    # 2 rounds of 2 clients: 4 x 10,000 bytes against 2 x 200, 99 % less.
    found = uplink(read(folder))
    assert (found.up, found.down, found.rounds) == (400, 440, [(200, 220), (200, 220)])
    assert (found.participations, found.full) == (4, 40_000)
    assert found.saving == pytest.approx(99)


def test_nothing_sent_is_no_saving(folder: Path) -> None:
    (folder / "rounds.jsonl").write_text(lines([{**a_round(1, 3), "bytes_up": 0}]))
    assert math.isnan(uplink(read(folder)).saving)


def test_validation_is_nats_per_token_where_a_round_was_judged(folder: Path) -> None:
    rows = [a_round(1, 3), {**a_round(2, 3), "validation": None}, a_round(3, 2)]
    (folder / "rounds.jsonl").write_text(lines(rows))
    assert validation(read(folder).rounds) == [
        (1, pytest.approx(3 * LN2)),
        (3, pytest.approx(2 * LN2)),
    ]


def test_a_run_that_has_only_begun_is_read(folder: Path) -> None:
    for name in ("clients.json", "rounds.jsonl", "evaluation.jsonl"):
        (folder / name).unlink()
    run = read(folder)
    assert (run.clients, run.rounds, run.baselines, run.evaluation) == ([], [], {}, [])
    assert summarize_models(run) == []
    assert uplink(run).up == 0


def test_baselines_are_read_by_their_folders_name(folder: Path) -> None:
    (folder / "baselines" / "local-only").mkdir(parents=True)
    (folder / "baselines" / "local-only" / "rounds.jsonl").write_text(lines([a_round(1, 3)]))
    assert [row["round"] for row in read(folder).baselines["local-only"]] == [1]


@pytest.mark.parametrize("rest", ['{"round": 3, "coh', '{"round": {"a": 1}', '{"round": 3}'])
def test_a_last_line_without_its_newline_was_never_written(folder: Path, rest: str) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(rest)
    assert [row["round"] for row in read(folder).rounds] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", None),
        ("run.json", '{"full_by'),
        ("settings.toml", "task = "),
        ("settings.toml", None),
        ("clients.json", '[{"client": "a"'),
        ("clients.json", '[{"name": "a"}]'),
        ("rounds.jsonl", 'no JSON\n{"round": 2}\n'),
        ("rounds.jsonl", '{"round": 2}\n'),
        ("rounds.jsonl", "17\n"),
        ("evaluation.jsonl", "\udcff\n"),
    ],
)
def test_a_missing_or_altered_file_is_one_line_that_names_it(
    folder: Path, name: str, content: str | None
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    assert str(folder / name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run at .*/nowhere"):
        read(tmp_path / "nowhere")


def test_perplexity_beyond_a_float_is_infinite_and_of_nothing_is_nan() -> None:
    assert MEASURE.compute(1000.0, 1) == math.inf
    assert math.isnan(MEASURE.compute(0.0, 0))
    assert math.isnan(MEASURE.compute(math.nan, 1))


def test_paired_interval_is_students() -> None:
    # 1, 2, 3: mean 2, deviation 1, t with 2 degrees of freedom 4.3027; 4.3027 / sqrt(3) = 2.4841.
    assert paired_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert paired_interval([5.0]) == (5.0, -math.inf, math.inf)


@pytest.mark.parametrize("count", [2, 3, 11, 12, 30, 1000])
def test_an_interval_is_students(count: int) -> None:
    values = [float(i % 7) for i in range(count)]
    mean, low, _ = paired_interval(values)
    error = stats.sem(values)
    assert (mean - low) / error == pytest.approx(stats.t.ppf(0.975, count - 1), rel=1e-9)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3.14159, "3.14"),
        (31.4159, "31.4"),
        (314.159, "314.2"),
        (31415.9, "31,416"),
        (0.03124, "0.0312"),
        (0.5, "0.500"),
        (0, "0.00"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_told_in_about_three_digits(value: float, told: str) -> None:
    assert number(value) == told


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (34.4e9, "34.4 GB")]
)
def test_sizes_are_in_decimal_units(count: float, told: str) -> None:
    assert size(count) == told
