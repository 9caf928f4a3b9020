"""The arithmetic of the paper's tables and figures, on records made by hand."""

import copy
import math
from typing import Any

import pytest

import cells
import comparing
import figures
import varying
import views
from fedgen_edge.tasks.language.task import MEASURE

VERSIONS = {"fedgen-edge": "0", "torch": "2"}


def item(**other: Any) -> dict[str, Any]:
    """What an item's file says."""
    usual = {
        **{"name": "toy", "records": "toy", "scale": "small", "recipe": "r.toml", "title": "a toy"},
        **{"seeds": [0, 1, 2], "reference": "a", "measures": ["word"], "models": ["global"]},
        **{"axis": "rank", "table": "curve", "variants": {"a": {}, "b": {}}},
    }
    return {**usual, **other}


def record(line: int, variant: str, seed: int, word: float, **other: Any) -> dict[str, Any]:
    """A record of 3 judged rounds: 10, 20 and 30 bytes up, 1, 2 and 3 seconds, 3, 2 and 1 nats."""
    way = [[r, 10 * r, 20 * r, 1.0 * r, 4.0 - r] for r in (1, 2, 3)]
    test = {"global": {"word": word, "pooled": 2.0}, "backbone": {"word": 80.0, "pooled": 4.0}}
    usual = {"line": line, "division": "", "variant": variant, "seed": seed, "test": test,
             "way": way, "chosen": {}, "measure": list(MEASURE), "versions": VERSIONS,
             "hardware": "H", "precision": "float32", "clients": 20, "cohort": 5, "rounds": 3,
             "bytes_up": 30, "bytes_down": 60, "bytes_full": 1000,
             "moves": [[1, 2.0, 1.0, 0.5], [2, 2.0, 1.0, None]],
             "seconds": {"federation": 3.0}}  # fmt: skip
    return {**usual, **other}


def rows(a: list[float], b: list[float], **of_b: Any) -> list[dict[str, Any]]:
    """Records of both variants, three seeds each."""
    first = [record(s + 1, "a", s, word) for s, word in enumerate(a)]
    return first + [record(s + 4, "b", s, word, **of_b) for s, word in enumerate(b)]


def test_a_curve_has_means_intervals_and_paired_differences() -> None:
    table = views.table(item(), rows([40, 50, 60], [20, 30, 40]))
    link = "](../../paper/results/toy-small.jsonl#L"
    # s = 10 and t = 4.3027 with 2 degrees of freedom, so half the interval is 4.3027 * 10 / 3^.5;
    # b lies 20 below a in each seed, and 30 of 1000 bytes were sent
    assert (
        f"| a |  | [50.0 ± 24.8{link}1-L3) |  | [30 bytes{link}1-L3) | "
        f"[60 bytes{link}1-L3) | [97.00{link}1-L3)" in table
    )
    assert f"| b |  | [30.0 ± 24.8{link}4-L6) | [-20.00 (-20.00 to -20.00){link}4-L6)" in table
    assert "- global: the mean is lowest with rank b; all others are settled above it." in table
    assert "20 clients, 5 a round, 3 rounds; seeds 0, 1, 2. H, float32" in table


def test_a_curves_models_are_held_against_the_first() -> None:
    found = rows([40, 50, 60], [20, 30, 40])
    table = views.table(item(models=["global", "backbone"]), found)
    assert "| backbone less global |" in table
    # 80 less 40, 50 and 60: the interval of 30 is as wide as theirs
    assert "[+30.00 (+5.16 to +54.84)](../../paper/results/toy-small.jsonl#L1-L3)" in table


def test_what_is_beside_the_axis_is_not_the_best_value_of_it() -> None:
    asked = item(beside=["b"], paper="a")
    knee = varying.knee(asked, rows([40, 50, 60], [20, 30, 40]), "global", "word")
    assert "the mean is lowest with rank a" in knee
    assert knee.endswith("The paper's a has it.")


def test_an_item_that_repeats_another_says_whether_its_outcome_is_found_again() -> None:
    models = ["global", "backbone"]
    here, there = item(models=models), item(models=models, name="first", records="first")
    # the backbone's 80 is 20 % below 100 and 100 % above 40, in every seed
    again = varying.compare_repeat(
        here, rows([100.0] * 3, [90.0] * 3), there, rows([40.0] * 3, [60.0] * 3)
    )
    assert "- global: rank a, the best of `first`, is not the best here." in again
    assert "- backbone below global, with rank a, %: [-100.00 (-100.00 to -100.00)](" in again
    assert "first-small.jsonl#L1-L3) in `first`, [+20.00 (+20.00 to +20.00)](" in again
    for own, holds in (([1.0, 2, 3], "is"), ([5.0, 1, 6], "may be")):
        again = varying.compare_repeat(
            here, rows(own, [4, 3, 3]), there, rows([1.0] * 3, [2.0] * 3)
        )
        assert f"- global: rank a, the best of `first`, {holds} the best here." in again


def test_what_is_not_settled_is_told() -> None:
    table = views.table(item(), rows([40, 50, 60], [60, 30, 50]))
    # b less a: 20, -20 and -10: its mean is -3.3, and s = 20.8
    assert "lowest with rank b; not settled from it: a." in table
    for variant, holds in {"a": "may have it", "b": "has it"}.items():
        knee = varying.knee(item(paper=variant), rows([40, 50, 60], [60, 30, 50]), "global", "word")
        assert knee.endswith(f" The paper's {variant} {holds}.")
    knee = varying.knee(item(paper="b"), rows([1, 2, 3], [4, 5, 6]), "global", "word")
    assert knee.endswith(" The paper's b has not.")


def test_a_choice_at_the_end_of_the_trials_is_told() -> None:
    rates = [{"training": {"lr": rate}} for rate in (1, 2, 3)]
    tuned = item(tuning={"seed": 9, "trials": rates})
    found = rows([1, 2, 3], [1, 2, 3], chosen=rates[2])
    for row in found[:3]:
        row["chosen"] = rates[1]
    caption = views.caption(tuned, found)
    assert "best of 3 trials by validation, on seed 9." in caption
    assert "The choice is the end of what was tried: b." in caption
    own = item(tuning={"seed": 9}, variants={v: {"trials": rates} for v in "ab"})
    assert views.caption(own, found) == caption


def pictured(a: list[float], b: list[float]) -> list[dict[str, Any]]:
    """The same records of pictures: the numbers are distances, and errors are half of them."""
    found = rows(a, b)
    for row in found:
        own = row["test"]["global"]
        told = {"seen_by": "FD", "made": 1001 + row["seed"], "real": 2000, "floor": 0.25}
        more = {"distance": own["word"], "distance_of_clients": 2 * own["word"], **told}
        row["test"] = {"global": {"pooled": own["word"] / 2, **more}}
        row["measure"] = ["denoising error", "images", "squared error", "pictures", 20, 0.5]
    return found


def test_samples_distances_are_told_with_their_number_and_what_real_pictures_have() -> None:
    measures = ["distance", "distance_of_clients", "pooled"]
    table = views.table(item(measures=measures), pictured([40, 50, 60], [20, 30, 40]))
    assert " FD: 1001 to 1003 samples of a model against 2000 test pictures" in table
    assert "two halves of which lie 0.250 apart." in table
    head = "global: FD | global less that of a | global: FD, mean of clients | "
    assert f"{head}global: denoising error |" in table
    # b: 30 on average, twice that for clients, and half of it as an error
    link = "](../../paper/results/toy-small.jsonl#L4-L6)"
    assert f"[60.0 ± 49.7{link} | [15.0 ± 12.4{link}" in table
    assert "- global, FD: the mean is lowest with rank b; all others are settled above it." in table
    assert "- global, denoising error: the mean is lowest with rank b" in table
    assert "perplexity" not in table
    assert "perplexity" not in figures.draw_figure(
        item(measures=measures, figure="curve"), pictured([40, 50, 60], [20, 30, 40])
    )


def test_best_values_of_several_items_lie_beside_each_other() -> None:
    text = (item(name="text", paper="b"), rows([40, 50, 60], [20, 30, 40]))
    drawn = item(name="pictures", measures=["distance"]), pictured([40, 60, 50], [60, 30, 50])
    assert varying.bests([text, drawn]).splitlines()[2:] == [
        "| text | global | perplexity per word | b |  | b |",
        "| pictures | global | FD | b | a |  |",
    ]


def shown() -> list[dict[str, Any]]:
    return [
        {"name": "frozen", "variant": "a", "model": "backbone", "costs": False},
        {"name": "A", "variant": "a", "model": "global", "paper": 100},
        {"name": "B", "variant": "b", "model": "global", "paper": 75},
    ]


def test_methods_are_held_against_what_the_paper_reports() -> None:
    claims = [{"better": "B", "worse": "A"}, {"better": "B", "worse": "A", "paper": [10, 100]}]
    claims += [{"saved": "B", "paper": 96}, {"saved": "A", "paper": 99}]
    slow = [[1, 1, 1, 5.0, 3.5], [2, 2, 2, 6.0, 3.25], [3, 3, 3, 7.0, 2.0]]
    asked = item(table="methods", rows=shown(), claims=claims)
    table = views.table(asked, rows([40, 50, 60], [20, 25, 30], way=slow))
    # all reach 2 nats: a in round 2, by 20 bytes and 2 seconds, and b in round 3
    whole = table.partition("<details")[2].splitlines()
    a, b = (line for line in whole if line.startswith(("| A", "| B")))
    link = "](../../paper/results/toy-small.jsonl#L"
    cells = [a.replace(f"{link}1-L3)", ""), b.replace(f"{link}4-L6)", "")]
    assert "| A | 100 |  | [50.0 ± 24.8 |  | [97.00 | [20 bytes | [40 bytes | [2.00 |" in cells[0]
    assert "[0.500 (0.500 to 0.500) | [97.00 | [3 bytes | [3 bytes | [3.00 | [7.00 |" in cells[1]
    assert "| frozen |  |  | [80.0" in table
    assert table.count("| - | - | - | - | - |") == 1
    assert "| method | the paper | perplexity per word | over A | uplink saved, % |" in table
    # half of a's is less than the paper's 0.75 of it, and more than 0.1
    assert "The paper: 0.750 (75 against 100). Here: [0.500 (0.500 to 0.500)](" in table
    assert "The order holds, and the gain is larger." in table
    assert "The paper: 0.100 (10 against 100)." in table
    assert "The order holds, and the gain is smaller." in table
    assert "saved by B.** The paper: more than 96 %. Here: [97.00 %](" in table
    assert table.count("It holds.") == table.count("It does not hold.") == 1


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([-0.9, -1.0, -1.1], "as large"),
        ([1.0, -1.0, 2.0], "not settled"),
        ([0.3, 0.31, 0.29], "the reverse"),
    ],
)
def test_a_verdict_is_by_the_interval(measured: list[float], said: str) -> None:
    assert said in comparing.verdict(-1.0, measured)


def test_the_goal_is_what_all_federated_methods_reach() -> None:
    found = rows([1, 2, 3], [1, 2, 3], way=[[1, 1, 1, 1.0, 2.5], [3, 1, 1, 1.0, 2.75]])
    methods = [cells.Shown(**one) for one in shown()]
    assert comparing.find_common_loss(methods, found) == dict.fromkeys((0, 1, 2), 2.5)
    alone = [one._replace(costs=one.variant == "a") for one in methods]
    assert comparing.find_common_loss(alone, found) == dict.fromkeys((0, 1, 2), 1.0)


def test_convergence_tells_what_the_last_third_changed() -> None:
    asked = item(table="convergence", rows=shown()[1:])
    found = rows([1, 2, 3], [1, 2, 3])
    assert comparing.thirds(found[0]) == pytest.approx([math.exp(nats) for nats in (3, 2, 1)])
    # e^1 is 1 - 1 / e below e^2
    assert f"{100 * (1 - 1 / math.e):+.2f} (" in views.table(asked, found)


def test_drift_is_told_where_the_loss_is_reached() -> None:
    found = rows([1, 2, 3], [1, 2, 3], way=[[1, 1, 1, 1.0, 2.5], [3, 1, 1, 1.0, 2.75]])
    for row in found:
        # in rounds 1, 2 and 3, once, twice and four times as far as the mean change
        row["moves"] = [[1, 9.0, 9.0, 1.0], [2, 4.0, 2.0, 0.5], [3, 4.0, 1.0, 0.0]]
    assert comparing.measure_drift(found[0], 1.0) == [3, pytest.approx((1 + 2 + 4) / 3), 0.5]
    assert comparing.measure_drift(found[0], 2.5) == [2, 1.5, 0.75]
    table = views.table(item(table="drift", rows=shown()[1:]), found)
    link = "](../../paper/results/toy-small.jsonl#L"
    assert f"| A | [2.00{link}1-L3) | [1.50{link}1-L3) | [0.750{link}1-L3) |" in table
    assert f"| B | [1.00{link}4-L6) | [1.00{link}4-L6) | [1.00{link}4-L6) |" in table


def test_a_record_that_is_older_than_drift_is_as_good_as_none() -> None:
    old = [{k: v for k, v in row.items() if k != "moves"} for row in rows([1, 2, 3], [1, 2, 3])]
    for row in old:
        row["item"] = "toy"
    with pytest.raises(FileNotFoundError, match="toy: line 1 does not tell drift"):
        views.table(item(table="drift", rows=shown()[1:]), old)


def test_a_grid_has_a_row_a_division() -> None:
    found = rows([40, 50, 60], [20, 30, 40])
    found += [{**row, "division": "far", "line": row["line"] + 6} for row in found]
    near, far = views.table(item(table="grid"), found).splitlines()[-2:]
    assert "**[30.0 ± 24.8](../../paper/results/toy-small.jsonl#L4-L6)**" in near
    assert far.startswith("| far | [50.0 ± 24.8](../../paper/results/toy-small.jsonl#L7-L9) |")


def test_a_grid_tells_how_much_of_what_a_backbone_lost_is_made_good() -> None:
    near = rows([40, 50, 60], [20, 30, 40])
    far = [{**row, "division": "far", "line": row["line"] + 6} for row in rows([40] * 3, [20] * 3)]
    for row, before in zip(far, near, strict=True):
        test, other = copy.deepcopy(row["test"]), before["test"]
        test["backbone"]["word"] = 8 * other["backbone"]["word"]  # three times the nats of twice
        test["global"]["word"] = 2 * other["global"]["word"]
        row["test"] = test
    asked = item(table="grid", rows=shown(), axis="steps")
    (line,) = (found for found in views.table(asked, near + far).splitlines()[-1:])
    assert line.startswith("| far | [66.7](../../paper/results/toy-small.jsonl#L7-L9) |")


def tuned() -> list[dict[str, Any]]:
    """Records of two divisions of two variants, with each of four clients' numbers."""
    found = []
    told = {"kept": ([90, 80, 100], 100), "always": ([90, 80, 110], 120)}
    for division, (own, last) in told.items():
        for line, (variant, seed) in enumerate((v, s) for v in "ab" for s in (0, 1, 2)):
            each = [*own, last - seed * (division == "always")]
            each = each if variant == "a" else [50 + seed] * 4
            test = {
                "global": {"pooled": 100.0, "word": 1.0, "each": [100, 100, 100, 100]},
                "personal": {"pooled": 90.0, "word": 1.0, "each": each},
            }
            at = line + 1 if division == "kept" else line + 7
            found.append(record(at, variant, seed, 1.0, division=division, test=test))
    return found


def test_clients_gains_are_told_and_who_is_hurt() -> None:
    asked = item(table="clients", models=["global", "personal"])
    table = views.table(asked, tuned())
    link = "](../../paper/results/toy-small.jsonl#L"
    # gains of 10, 20, 0 and 0 %; and of 10, 20, -10 and -20, -19 or -18 %, whose means are 0, 0.25
    # and 0.5: s = 0.25, so the interval reaches 4.3027 * 0.25 / 3^.5 = 0.62 to both sides
    cells = f"[+7.50 (+7.50 to +7.50){link}1-L3) | [50.0{link}1-L3) | [0.00{link}1-L3) |"
    assert f"| kept | a |  | [100.0{link}1-L3) | [90.0{link}1-L3) | {cells}" in table
    cells = f"[+0.25 (-0.37 to +0.87){link}7-L9) | [50.0{link}7-L9) | [50.0{link}7-L9) |"
    assert f"| always | a |  | [100.0{link}1-L3) | [90.0{link}7-L9) | {cells}" in table
    # b gains 50, 49 and 48 %: 49, and 4.3027 / 3^.5 around it
    assert "[+49.00 (+46.52 to +51.48)](" in table
    assert "- kept: pays with a, b." in table
    assert "- always: pays with b; is not settled with a." in table


def test_what_costs_clients_is_told() -> None:
    found = tuned()
    for row in found[6:9]:
        row["test"]["personal"]["each"] = [101 + row["seed"]] * 4
    held = views.by_client(item(models=["global", "personal"]), found)
    assert [gain.mean for gain in held["always"]["a"]] == pytest.approx([-1, -2, -3])
    # the interval of -2 with s = 1 reaches 4.3027 / 3^.5 = 2.48 to both sides
    assert views.describe_gains(held["always"]) == "pays with b; is not settled with a"
    for row in found[6:9]:
        row["test"]["personal"]["each"] = [120 + row["seed"]] * 4
    held = views.by_client(item(models=["global", "personal"]), found)
    assert views.describe_gains(held["always"]) == "pays with b; costs with a"


@pytest.mark.parametrize("view", figures.VIEWS)
def test_figures_name_their_lines_units_and_seeds(view: str) -> None:
    models = ["global", "personal" if view == "clients" else "backbone"]
    asked = item(figure=view, rows=shown()[1:], models=models)
    svg = figures.draw_figure(
        asked, tuned() if view == "clients" else rows([40, 50, 60], [20, 30, 40])
    )
    names = {"clients": ("kept", "always", "test perplexity below global, %"),
             "curve": ("global", "backbone", "perplexity per word"),
             "convergence": ("A", "B", "perplexity per token", "sent by all clients"),
             "drift": ("A", "B", "cosine between clients"),
             "grid": ("A", "B", "perplexity per word")}  # fmt: skip
    for name in (*names[view], "mean and 95 % interval of 3 seeds"):
        assert name in svg


def test_signatures_count_where_a_failure_is_named_and_where_it_was_not_provoked() -> None:
    failures = [{"name": "too much", "variant": "b", "findings": ["It swings"]}]
    variants = {"a": {}, "b": {"training": {"lr": 0.5}}}
    asked = item(table="signatures", failures=failures, variants=variants)
    found = rows([1, 2, 3], [1, 2, 3], findings={"It swings": "by 7 %"})
    for row, said in zip(found, ({}, {"It swings": "a little"}, {"Odd": "!"}), strict=False):
        row["findings"] = said
    found[3]["findings"] = {"Odd": "!"}
    table = views.table(asked, found)
    a, b = (f"](../../paper/results/toy-small.jsonl#{lines})" for lines in ("L1-L3", "L4-L6"))
    # of the second variant's seeds the last two; of the first's, the second
    cells = ["too much", "`training.lr=0.5`", "It swings", f"[2 of 3{b}", f"[1 of 3{a}", "by 7 %"]
    assert f"| {' | '.join(cells)} |" in table
    said = f"It swings ([1 of 3{a}); Odd ([1 of 3{a})."
    assert table.endswith(f"Where nothing was provoked, the diagnosis says: {said}")


def test_a_recipe_is_shown_seed_by_seed_with_the_differences_that_it_names() -> None:
    shown_rows = [
        {"name": "frozen", "variant": "a", "model": "backbone"},
        {"name": "A", "variant": "a", "model": "global"},
        {"name": "B", "variant": "b", "model": "global"},
    ]
    asked = item(table="seeds", rows=shown_rows, differences=[["A", "frozen"], ["B", "A"]])
    spent = {"federation": 3.0, "personal": 2.0, "baselines": {"local-only": 1.5}}
    found = rows([40, 50, 60], [20, 25, 27], bytes_up=0)
    for row in found:
        row |= {"seconds": {**spent, "personal": 2.0 + row["seed"]}, "peak_bytes": 2e9}
    table = views.table(asked, found)
    link = "](../../paper/results/toy-small.jsonl#L"
    assert f"| A | [40.00{link}1) | [50.00{link}2) | [60.00{link}3) | [50.00{link}1-L3) |" in table
    # 40, 50 and 60 less 80: -30, and 4.3027 * 10 / 3^.5 around it
    assert f"| A less frozen | [-30.00{link}1-L3) | -54.84 to -5.16 |" in table
    assert f"| B less A | [-26.00{link}1-L6) |" in table
    saved = "clients send 30 bytes in a run, where full-model FedAvg would send 1.00 kB (float32)"
    # 3, 1.5, and 2 to 4 seconds
    assert f"- `a`: 6 to 8 seconds a run, 2.00 GB of memory; {saved}: 97.00 % saved." in table
    assert "- `b`: 6 to 8 seconds a run, 2.00 GB of memory; clients send nothing." in table


def test_validation_of_each_model_is_shown_by_what_is_varied() -> None:
    asked = item(table="validation", measures=["validation"], models=["global", "alone"])
    found = [
        record(line, variant, 0, 1.0, validation={"global": 30.0 + line, "alone": 40.0 * line})
        for line, variant in enumerate("ab", 1)
    ]
    table = views.table(asked, found)
    link = "](../../paper/results/toy-small.jsonl#L"
    assert "Validation perplexity per token, mean of clients." in table
    assert f"| a | [31.00{link}1) | [40.00{link}1) |" in table
    assert f"| b | [32.00{link}2) | [80.00{link}2) |" in table


def test_a_recipes_samples_are_shown_with_what_each_model_costs() -> None:
    test = {
        **{"mean": 0.05, "distance": 17.0, "distance_of_clients": 25.0, "kernel": [1.5, 1.4, 1.6]},
        **{"seen_classes": 32.0, "unseen_classes": 44.0, "recall": 0.25, "diversity": 1.25},
        **{"seen_by": "FD", "made": 2009, "real": 10000, "floor": 0.175},
        **{"bytes_up": 2000, "seconds": 211.4},
    }
    facts = {"alpha": 0.3, "threads": 1, "parameters": 1500, "adapter_parameters": 130}
    facts |= {"training": {"steps": 10, "batch": 16}, "unseen": ["frog", "truck"]}
    measure = ["denoising error", "images", "squared error", "images", 20, 0.5]
    found = [record(1, "a", 0, 1.0, **facts, test={"global": test}, measure=measure)]
    line = {"name": "A", "variant": "a", "model": "global"}
    asked = item(table="samples", seeds=[0], variants={"a": {}}, rows=[line])
    table = views.table(asked, found)
    assert "1,500 weights, of which the adapter has 130." in table
    link = "[A](../../paper/results/toy-small.jsonl#L1)"
    assert f"| {link} | 17.0 | 32.0 | 44.0 | 0.0500 | 2.00 kB |" in table
    cells = "17.0 | 1,500 | 25.0 | 32.0 | 44.0 | 0.250 | 1.25 | 0.0500 | 2.00 kB | 211"
    assert f"| {link} | {cells} |" in table


def test_columns_beyond_the_first_needed_ones_are_folded() -> None:
    lines = cells.make_table(["a", "b", "c"], [["1", "2", "3"]], narrow=(0, 2))
    assert lines[:3] == ["| a | c |", "|---|---|", "| 1 | 3 |"]
    assert lines[4:6] == ['<details markdown="1">', "<summary>All columns</summary>"]
    assert lines[7:] == ["| a | b | c |", "|---|---|---|", "| 1 | 2 | 3 |", "", "</details>"]
    assert cells.make_table(["a"], [["1"]]) == ["| a |", "|---|", "| 1 |"]
