import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.report.diagnose import SIGNATURES, diagnose
from fedgen_edge.report.summary import Row, RunFiles
from fedgen_edge.tasks.language.task import MEASURE

CLIENTS = ("a", "b", "c", "d")


def on_test(**perplexities: float) -> list[Row]:
    """The same perplexity for all four clients, model by model."""
    return [
        {
            "model": m.replace("_", "-"),
            "client": c,
            "total": 100 * math.log(p),
            "count": 100,
            "words": 70,
        }
        for m, p in perplexities.items()
        for c in CLIENTS
    ]


def trained(losses: Sequence[float], validation: Sequence[float], tokens: int = 4000) -> list[Row]:
    """Four clients a round; orthogonal unit updates of equal weight have a mean of norm 1/2."""
    update = {"loss": 3.0, "steps": 6, "weight": 10.0, "bytes_up": 100, "drift": 1.0}
    return [
        {
            "round": number,
            "cohort": list(CLIENTS),
            "loss": loss,
            "validation": {"total": tokens * nats, "count": tokens, "words": tokens, "clients": {}},
            "bytes_up": 400,
            "bytes_down": 400,
            "clients": [{"client": c, **update} for c in CLIENTS],
            "update_norm": 0.5,
            "mean_norm": 0.5,
        }
        for number, (loss, nats) in enumerate(zip(losses, validation, strict=True), 1)
    ]


FALLING = (4.0, 3.5, 3.2, 3.0, 2.9)
HEALTHY = RunFiles(
    folder=Path("run"),
    settings={"training.lr": 0.001, "federation.rounds": 5},
    facts={"finished": True},
    measure=MEASURE,
    clients=[{"client": c, "train": 90, "items": 6000, "newcomer": False} for c in CLIENTS],
    rounds=trained(FALLING, FALLING),
    baselines={},
    personal=[{"client": c, "validation": [3.0, 2.8], "chosen": 1} for c in CLIENTS],
    evaluation=on_test(backbone=60, local_only=40, **{"global": 30}, personal=25),
    samples=[],
    distances=[],
)


def judged(backbone: Row | None = None, **change: Any) -> dict[str, Any]:
    """Samples of two models, which are as good as real pictures but for the changes."""
    row = {
        "model": "global",
        "client": None,
        "distance": "FD-pixels",
        "frechet": 2.0,
        "made": 100,
        "real": 100,
        "few": None,
        "precision": 0.8,
        "recall": 0.7,
        "density": 1.0,
        "coverage": 0.9,
        "diversity": {"0": 0.9, "1": 1.1},
        "shares": {"0": 0.5, "1": 0.5},
        "real_shares": {"0": 0.5, "1": 0.5},
    }
    return {"distances": [{**row, "model": "backbone", **(backbone or {})}, {**row, **change}]}


def ranked(layers: Mapping[str, Sequence[float]]) -> list[Row]:
    """Healthy rounds, with a layer's effective rank in each."""
    return [
        {**row, "layers": {k: {"rank": float(each[at])} for k, each in layers.items()}}
        for at, row in enumerate(HEALTHY.rounds)
    ]


def without_data(**change: Any) -> list[Row]:
    return [{**HEALTHY.clients[0], **change}, *HEALTHY.clients[1:]]


def of_all(name: str, value: object) -> list[Row]:
    return [{**row, name: value} for row in HEALTHY.rounds]


SICK: dict[str, tuple[str, dict[str, Any], str]] = {
    "nan": (
        "Training broke down: a loss is not a number",
        {"rounds": trained((4.0, math.nan, 3.2, 3.0, 2.9), FALLING)},
        "First in round 2; 1 numbers",
    ),
    "a high rate": (  # its signs are many; data, clients and tuning are not blamed
        "The learning rate is too high: training made the model worse",
        {
            "rounds": trained((6.5, 6.2, 6.4, 6.1, 6.3), (5.1, 5.3, 5.2, 5.6, 5.5)),
            "evaluation": on_test(backbone=60, local_only=59, **{"global": 150}, personal=150),
            "personal": [{**row, "chosen": 0} for row in HEALTHY.personal],
        },  # e^6.1 = 445.9
        "Test perplexity is 150.0 after the rounds, and 60.0 with the backbone they began from; in "
        "training the best round's was 445.9.",
    ),
    "a high rate, not tested yet": (
        "The learning rate is too high: training made the model worse",
        {"rounds": trained((4.0, 4.2, 4.5), (4.0, 4.2, 4.5)), "evaluation": [], "personal": []},
        "Training loss is 4.000 nats a token in the first round, 4.500 in the last.",
    ),
    "some are better alone": (  # 45 against 40
        "Some clients do better alone",
        {
            "evaluation": [
                *HEALTHY.evaluation,
                {**on_test(x=45)[0], "model": "global"},
                {**on_test(x=45)[0], "model": "personal"},
            ]
        },
        "1 of 4 with their personal adapter: a (12.5 % worse).",
    ),
    "diverges": (  # e^3 = 20.09, e^4 = 54.60
        "Training diverges",
        {"rounds": trained(FALLING, (3.0, 3.2, 3.5, 3.8, 4.0))},
        "20.1 in round 1 and 54.6 in round 5",
    ),
    "past its best": (  # e^2 = 7.39, e^2.5 = 12.18
        "Validation is past its best",
        {"rounds": trained(FALLING, (3.0, 2.0, 2.2, 2.4, 2.5))},
        "7.39 in round 2 and 12.2 in round 5",
    ),
    "swings": (  # up by 0.3 and 0.3 of four steps, down by 0.4 twice; e^0.3 = 1.35
        "Validation swings from round to round",
        {"rounds": trained(FALLING, (2.7, 3.0, 2.6, 2.9, 2.5))},
        "rose in 2 of 4 steps, by up to 35.0 %; a cohort is 4 of 4",
    ),
    "stuck": (
        "The federation learns next to nothing",
        {"rounds": trained((4.0, 3.999, 3.998), (4.0, 3.999, 3.998)), "evaluation": []},
        "4.000 nats a token at first, 3.998 at its best",
    ),
    "hurt by federation": (
        "The global adapter is worse than the backbone for some clients",
        {
            "evaluation": [
                *on_test(backbone=60, **{"global": 30}),
                {**on_test(x=90)[0], "model": "global"},
            ]
        },
        "1 of 4: a (90.0 against 60.0)",
    ),
    "one picture a class": (
        "Samples are too much alike (mode collapse)",
        judged(diversity={"0": 0.1, "1": 0.3}),
        "Of the global samples, two of a class lie 0.200 times as far apart as real.",
    ),
    "kinds are missing": (
        "Samples are too much alike (mode collapse)",
        judged(recall=0.05),
        "they reach 5 % of the real pictures",
    ),
    "classes are missing": (
        "Samples are too much alike (mode collapse)",
        judged(shares={"0": 0.9, "1": 0.1}),
        "the classes' shares are 40 % off",
    ),
    "a half of what little there was is lost": (
        "Samples are too much alike (mode collapse)",
        judged({"diversity": {"0": 0.6}}, diversity={"0": 0.29}),
        "two of a class lie 0.290 times as far apart as real.",
    ),
    "poor from the start": (  # 0.4 is more than a half of 0.6; few kinds, as before
        "The backbone's own samples are too much alike",
        judged({"recall": 0.01, "diversity": {"0": 0.6}}, recall=0.02, diversity={"0": 0.4}),
        "Of its samples, they reach 1 % of the real pictures.",
    ),
    "poor from the start, and unreal": (
        "The backbone's own samples are too much alike",
        judged({"recall": 0.01, "precision": 0.1}, recall=0.01),
        "Of its samples, they reach 1 % of the real pictures.",
    ),
    "few pictures": (
        "The samples' distance rests on few pictures",
        {"distances": [{**judged()["distances"][0], "few": "64 are too few"}]},
        "64 are too few.",
    ),
    "hurt by tuning": (
        "Personal tuning makes some clients worse",
        {"evaluation": on_test(**{"global": 30}, personal=33)},
        "4 of 4: a (33.0 against 30.0), b (33.0 against 30.0), c (33.0 against 30.0) and 1 more",
    ),
    "fallback": (
        "Most clients gain nothing from personal tuning",
        {"personal": [{**row, "chosen": int(row["client"] == "a")} for row in HEALTHY.personal]},
        "3 of 4 kept the global adapter: b, c, d",
    ),
    "alone": (  # 25 against 20
        "The federation does not help: clients do better alone",
        {"evaluation": on_test(backbone=60, local_only=20, **{"global": 30}, personal=25)},
        "The best mean is 25.0 % above local-only's",
    ),
    "alone beats global": (  # 30 / 27 = 1.111, 25 / 27 = 0.926
        "Clients alone do better than the global adapter, not than personal ones",
        {"evaluation": on_test(backbone=60, local_only=27, **{"global": 30}, personal=25)},
        "is 11.1 % above local-only's; with personal ones, 7.4 % below it",
    ),
    "little data": (
        "Some clients have too little data",
        {"clients": without_data(items=900)},
        "a (900 tokens)",
    ),
    "pulled apart": (  # |mean|^2 = 0.01 = 4/16 + 12/16 cos: cos = -0.32
        "Clients pull the adapter apart",
        {"rounds": of_all("mean_norm", 0.1)},
        "moves by 1.00, their mean by 0.100: two clients' updates have a cosine of about -0.32",
    ),
    "rank collapse": (
        "Adapters have lost their rank (rank collapse)",
        {"rounds": ranked({"x": (4, 5, 3, 2, 1.2), "y": (3, 3, 3, 3, 3), "z": (2, 3, 2, 2, 1.1)})},
        "In 2 of 3 layers the product of B and A is all but of rank 1: in x its effective rank "
        "fell from 5.00 to 1.20.",
    ),
    "lopsided": (  # 42,000 of 42,000 + 3 x 6,000
        "One client outweighs all others",
        {"clients": without_data(items=42000)},
        "a has 70 % of 60000 tokens",
    ),
    "noisy": (  # 3 / sqrt(900) = 0.1, e^0.1 = 1.105
        "Validation reads little",
        {"rounds": trained(FALLING, FALLING, tokens=900)},
        "900 tokens a round, so its perplexity is known to about 11 %",
    ),
    "idle": (
        "Some clients were never drawn",
        {"rounds": of_all("cohort", ["a", "b", "c"])},
        "1 of 4: d",
    ),
    "nobody finishes": (
        "Rounds pass that nobody finishes",
        {"rounds": [*HEALTHY.rounds[:2], *of_all("clients", [])[2:]]},
        "3 of 5 rounds, round 3 first.",
    ),
    "unfinished": (
        "The run has not finished",
        {"facts": {"finished": False}, "rounds": HEALTHY.rounds[:2]},
        "2 of 5 rounds",
    ),
}


def test_a_healthy_run_says_that_nothing_was_found() -> None:
    (found,) = diagnose(HEALTHY)
    assert (found.severity, found.title) == ("good", "Nothing found")
    assert found.evidence == f"{len(SIGNATURES)} checks over 5 rounds, 4 clients, 16 tests."


@pytest.mark.parametrize("name", SICK)
def test_a_signature_fires_alone_with_its_numbers(name: str) -> None:
    title, change, evidence = SICK[name]
    (found,) = diagnose(replace(HEALTHY, **change))
    assert found.title == title
    assert evidence in found.evidence


def test_every_signature_has_its_case() -> None:
    assert {title for title, _, _ in SICK.values()} == {title for _, title, _, _ in SIGNATURES}


def test_one_step_a_round_is_too_little_data() -> None:
    rounds = [
        {**row, "clients": [{**row["clients"][0], "steps": 1}, *row["clients"][1:]]}
        for row in HEALTHY.rounds
    ]
    assert "a (6000 tokens)" in diagnose(replace(HEALTHY, rounds=rounds))[0].evidence


def test_newcomers_are_expected_to_be_idle() -> None:
    run = replace(HEALTHY, rounds=of_all("cohort", ["b", "c", "d"]))
    assert diagnose(replace(run, clients=without_data(newcomer=True)))[0].severity == "good"


def test_the_gravest_comes_first() -> None:
    change = SICK["unfinished"][1] | {"rounds": trained((math.nan,), (3.0,))}
    found = diagnose(replace(HEALTHY, **change))
    assert [finding.severity for finding in found] == ["problem", "note"]


def test_advice_names_a_setting_with_its_value() -> None:
    (found,) = diagnose(replace(HEALTHY, **SICK["swings"][1]))
    assert "Lower training.lr=0.001," in found.advice


@pytest.mark.parametrize(
    ("losses", "validation"),
    [
        ((4.2, 3.0, 2.0, 1.0, 0.5), (4.0, 4.2, 4.4, 4.8, 5.0)),  # overfitting
        ((4.2, 4.15, 4.1, 4.1, 4.1), (4.0, 4.0, 4.0, 4.0, 4.0)),  # clients that undo each other
        ((0.9,), (5.0,)),  # one long round on little text
    ],
)
def test_a_model_that_is_worse_though_training_fell_is_not_blamed_on_the_rate(
    losses: Sequence[float], validation: Sequence[float]
) -> None:
    worse = on_test(backbone=60, **{"global": 150})  # e^4.09 = 60
    run = replace(HEALTHY, rounds=trained(losses, validation), evaluation=worse, personal=[])
    titles = {finding.title for finding in diagnose(run)}
    assert "The global adapter is worse than the backbone for some clients" in titles
    assert not any("learning rate" in title for title in titles)


def test_a_rate_that_blows_up_the_first_round_is_blamed_though_later_ones_recover() -> None:
    rounds = trained((9.0, 8.0, 7.5, 7.2, 7.0), (8.5, 8.0, 7.5, 7.1, 6.9))
    worse = on_test(backbone=60, local_only=50, **{"global": 900}, personal=900)
    found = diagnose(replace(HEALTHY, rounds=rounds, evaluation=worse))
    assert [finding.severity for finding in found] == ["problem"]
    assert "Lower training.lr=0.001 tenfold" in found[0].advice


@pytest.mark.parametrize(("clients", "fires"), [(3, True), (4, True), (5, False)])
def test_losses_of_less_than_a_percent_count_from_a_quarter_of_the_clients(
    clients: int, fires: bool
) -> None:
    # one has 40.1 where training alone has 40, the others 25
    names = [str(number) for number in range(clients)]
    rows = {"local-only": [40.0] * clients, "personal": [40.1] + [25.0] * (clients - 1)}
    evaluation = [
        {"model": m, "client": c, "total": 100 * math.log(p), "count": 100}
        for m, values in rows.items()
        for c, p in zip(names, values, strict=True)
    ]
    people = [{**HEALTHY.clients[0], "client": name} for name in names]
    run = replace(HEALTHY, clients=people, evaluation=evaluation, rounds=[])
    found = [finding.title for finding in diagnose(run)]
    assert ("Some clients do better alone" in found) == fires


def test_an_empty_run_is_only_unfinished() -> None:
    empty = RunFiles(Path("run"), {}, {}, MEASURE, [], [], {}, [], [], [], [])
    assert [finding.title for finding in diagnose(empty)] == ["The run has not finished"]


@pytest.mark.parametrize(("share", "lost"), [(0.9, True), (0.75, False)])
def test_of_classes_that_a_backbone_misplaced_half_of_the_rest_must_be_lost(
    share: float, lost: bool
) -> None:
    # the backbone is 40 % off, so more than 70 % off is a half of what it had right: 80 and 65 here
    real = {"0": 0.1, "1": 0.9}
    run = judged({"real_shares": real}, shares={"0": share, "1": 1 - share}, real_shares=real)
    found = [finding.title for finding in diagnose(replace(HEALTHY, **run))]
    assert ("Samples are too much alike (mode collapse)" in found) == lost
    assert "The backbone's own samples are too much alike" in found
