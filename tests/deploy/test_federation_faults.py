"""What a server does when sites are silent, late, wrong, lost, new or revoked: in process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge import files
from fedgen_edge.config import Method, Settings
from fedgen_edge.deploy.provision import kits
from fedgen_edge.deploy.server import status
from fedgen_edge.deploy.server.main import prepare_server
from fedgen_edge.deploy.server.status import list_sites as shown
from fedgen_edge.errors import CarrierError, ConfigError, QuorumError
from fedgen_edge.network.messages import Reply, WorkRequest
from fedgen_edge.report.page import headline
from fedgen_edge.report.summary import read
from fedgen_edge.runs import records
from support.loop import (
    Fault,
    Loop,
    Run,
    Stub,
    When,
    conduct,
    declining,
    failed,
    first,
    hurry,
    late,
    of,
    outcome,
    saying,
    server,
    silent,
    stubs,
    tampered_line,
    tampered_payload,
    twice,
)
from support.sites import recipe

ABC = ("a", "b", "c")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def settings(rounds: int = 3, cohort: int | None = None, every: int = 1) -> Settings:
    more = {
        "federation": {"rounds": rounds, "cohort": cohort},
        "evaluation": {"sample_tokens": 0, "every_rounds": every},
        "training": {"schedule": "constant"},
    }
    return recipe(None, **more)


def loop(*faults: tuple[When, Fault], names: tuple[str, ...] = ABC, rounds: int = 3) -> Loop:
    return Loop({k: v.handle for k, v in stubs(*names, rounds=rounds).items()}, [*faults])


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three rounds of three sites leave."""
    run = conduct(server(tmp_path_factory.mktemp("fed") / "fed", settings(), ABC), loop())
    return outcome(run.home.run)


def models(run: Path) -> dict[str, bytes]:
    """Every committed model, to the bit."""
    return {str(p): p.read_bytes() for p in sorted(run.glob("checkpoints/*/*"))}


def stat(run: Run) -> dict[str, dict[str, Any]]:
    return {row["site"]: row for row in shown(run.home.folder)}


def test_more_are_asked_than_are_wanted_and_the_slow_are_not_waited_for(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e")
    carrier = loop(names=names)
    carrier.slow = ["e", "d"]
    run = conduct(server(tmp_path / "fed", settings(cohort=3), names), carrier)
    lines = records.lines(run.home.run / "rounds.jsonl")
    for at, line in enumerate(lines):
        asked = [name for r, _, name in carrier.rounds() if r == at]
        assert len(asked) == 4  # 1.3 times 3, rounded up
        quick = [name for name in asked if name not in carrier.slow]
        came = sorted([*quick, *[name for name in carrier.slow if name in asked]][:3])
        assert line["cohort"] == came
        assert len(line["clients"]) == 3
    assert any("e" not in line["cohort"] for line in lines)


def test_without_a_cohort_every_site_of_the_moment_is_wanted(tmp_path: Path) -> None:
    folder = server(tmp_path / "fed", settings(), ABC)
    carrier = loop()
    act = newcomer(folder, carrier, "d")
    carrier.faults = [(When("a", round=0), first(act))]
    run = conduct(folder, carrier)
    cohorts = [line["cohort"] for line in records.lines(run.home.run / "rounds.jsonl")]
    assert cohorts == [[*ABC], [*ABC, "d"], [*ABC, "d"]]


def test_a_round_that_misses_its_quorum_leaves_all_as_it_was_and_is_tried_again(
    tmp_path: Path, unharmed: dict[str, Any]
) -> None:
    before: list[dict[str, bytes]] = []
    folder = server(tmp_path / "fed", settings(), ABC)

    def look() -> None:
        before.append(models(folder / "run"))

    carrier = loop(
        (When("a", round=1, attempt=0), first(look)),
        (When("b", round=1, attempt=0), silent),
        (When("c", round=1, attempt=0), failed),
        (When("a", round=1, attempt=1), first(look)),
    )
    run = conduct(folder, carrier)
    assert before[0] == before[1]
    assert before[0]
    (said,) = [e.line["said"] for e in run.events if "said" in e.line]
    assert said.startswith("round 2 had 1 of the 2 updates that it needs, from 3 sites asked")
    assert [w for w in run.log if w[0] in {"opened", "abandoned", "committed"}] == [
        ("opened", None, 0, 0, None),
        ("committed", None, 0, None, None),
        ("opened", None, 1, 0, None),
        ("abandoned", None, 1, None, None),
        ("opened", None, 1, 1, None),
        ("committed", None, 1, None, None),
        ("opened", None, 2, 0, None),
        ("committed", None, 2, None, None),
    ]
    assert outcome(run.home.run) == unharmed


def test_after_so_many_attempts_the_server_ends_and_the_same_command_goes_on(
    tmp_path: Path, unharmed: dict[str, Any]
) -> None:
    folder = server(tmp_path / "fed", settings(), ABC, attempts=3)
    carrier = loop((When("b", round=2), silent), (When("c", round=2), silent))
    with pytest.raises(QuorumError, match="round 3 had 1 of the 2"):
        conduct(folder, carrier)
    assert [a for r, a, name in carrier.rounds() if (r, name) == (2, "b")] == [0, 1, 2]
    again = loop()
    run = conduct(folder, again)
    assert {(r, a) for r, a, _ in again.rounds()} == {(2, 3)}
    assert outcome(run.home.run) == unharmed


def test_pauses_are_doubled_and_begin_anew_after_a_commit(tmp_path: Path) -> None:
    when = [(1, 0), (1, 1), (1, 2), (2, 0)]
    faults = [(When(name, "train", *w), silent) for name in ("a", "b") for w in when]
    run = conduct(server(tmp_path / "fed", settings(), ABC, back_off=2e-3), loop(*faults))
    pauses = [e.line["said"].rsplit(" in ")[-1] for e in run.events if "said" in e.line]
    assert pauses == ["0.002 s", "0.004 s", "0.008 s", "0.002 s"]


def test_too_few_sites_are_waited_for_and_then_said(tmp_path: Path) -> None:
    carrier = loop()
    carrier.away = {"a", "c"}
    folder = server(tmp_path / "fed", settings(), ABC, attempts=2)
    with pytest.raises(QuorumError, match=r"round 1 needs 2 sites, and 1 are there: b"):
        conduct(folder, carrier)
    assert carrier.rounds() == []


WRONG: dict[str, tuple[str, str | None, Fault]] = {
    "failed": ("failed", None, failed),
    "declined": ("declined", "declined", declining()),
    "line": ("refused", "malformed", tampered_line),
    "payload": ("refused", "change-too-large", tampered_payload),
    "weight": ("refused", "bad-weight", saying(weight=400)),
    "loss": ("refused", "bad-loss", saying(loss=None)),
    "another's": ("refused", "bad-weight", of("c")),
}


@pytest.fixture(scope="module")
def hushed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is left where one site was silent in the second round."""
    folder = server(tmp_path_factory.mktemp("fed") / "fed", settings(), ABC)
    return outcome(conduct(folder, loop((When("b", round=1), silent))).home.run)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_count_leaves_the_run_as_silence_would(
    tmp_path: Path, hushed: dict[str, Any], unharmed: dict[str, Any], wrong: str
) -> None:
    event, code, fault = WRONG[wrong]
    carrier = loop((When("b", round=1), fault))
    carrier.slow = ["b"]
    run = conduct(server(tmp_path / "fed", settings(), ABC), carrier)
    assert run.happened(event) == [("b", 1, code)]
    assert outcome(run.home.run) == hushed
    assert hushed != unharmed


def test_a_site_that_raises_fails_alone(tmp_path: Path, hushed: dict[str, Any]) -> None:
    carrier = loop()
    right = carrier.sites["b"]

    def handle(text: str, payload: bytes) -> tuple[str, bytes]:
        if '"kind":"train"' in text and '"round":1' in text:
            raise ZeroDivisionError
        return right(text, payload)

    carrier.sites["b"] = handle
    run = conduct(server(tmp_path / "fed", settings(), ABC), carrier)
    assert run.happened("failed") == [("b", 1, None)]
    assert outcome(run.home.run) == hushed


def test_a_late_answer_of_an_earlier_round_is_refused_and_the_right_one_counts(
    tmp_path: Path,
) -> None:
    def run(name: str, fault: Fault) -> Run:
        return conduct(
            server(tmp_path / name, settings(every=3), ABC), loop((When("b", round=1), fault))
        )

    found, expected = run("late", late), run("silent", silent)
    assert found.happened("refused") == [("b", 2, "stale-round")]
    assert [line["cohort"] for line in records.lines(found.home.run / "rounds.jsonl")] == [
        ["a", "b", "c"],
        ["a", "c"],
        ["a", "b", "c"],
    ]
    assert outcome(found.home.run) == outcome(expected.home.run)


def test_a_late_answer_of_an_earlier_attempt_is_refused_and_the_right_one_counts(
    tmp_path: Path, unharmed: dict[str, Any]
) -> None:
    first_try = [(When(name, round=1, attempt=0), late) for name in ("b", "c")]
    run = conduct(server(tmp_path / "fed", settings(), ABC), loop(*first_try))
    assert run.happened("refused") == [(name, 1, "wrong-attempt") for name in ("b", "c")]
    assert outcome(run.home.run) == unharmed


def test_an_answer_that_comes_twice_counts_once(tmp_path: Path, unharmed: dict[str, Any]) -> None:
    run = conduct(server(tmp_path / "fed", settings(), ABC), loop((When(kind=None), twice)))
    assert len(run.happened("accepted")) == 9
    assert run.happened("refused") == []
    assert outcome(run.home.run) == unharmed


def test_three_offences_leave_a_site_out_also_after_a_restart(tmp_path: Path) -> None:
    folder = server(tmp_path / "fed", settings(rounds=5), ABC)
    carrier = loop((When("b"), tampered_payload), rounds=5)
    conduct(folder, carrier, until=2)
    again = loop((When("b"), tampered_payload), rounds=5)
    run = conduct(folder, again)
    asked = {r for r, _, name in carrier.rounds() + again.rounds() if name == "b"}
    assert asked == {0, 1, 2}
    assert run.happened("refused") == [("b", at, "change-too-large") for at in range(3)]
    third = loop(rounds=5)
    conduct(folder, third)
    assert "b" not in {name for name, _ in third.asked}
    assert stat(run)["b"]["state"] == "left out"
    assert stat(run)["b"]["refused"] == 3
    assert [s for s in run.told if s.startswith("b: refused: change-too-large: ")]
    # nor is it waited for afterwards
    assert {line["client"] for line in records.lines(run.home.run / "personal.jsonl")} == {"a", "c"}
    assert not [said for said in run.told if "resume" in said]


@pytest.mark.parametrize("name", ["fedsa-lora", "fed-sb"])
def test_a_limit_on_products_is_refused_where_a_factor_is_not_sent(
    tmp_path: Path, name: str
) -> None:
    kept = replace(settings(), method=Method(name=name))
    folder = server(tmp_path / "fed", kept, ABC, spectrum=1.0)
    with pytest.raises(ConfigError, match=rf"spectrum=1\.0 .* method\.name='{name}'.*: leave it"):
        prepare_server(folder)
    assert not (folder / "run").exists()
    prepare_server(server(tmp_path / "other", settings(), ABC, spectrum=1.0))


def test_a_site_that_is_left_out_is_wanted_no_more_though_all_are(tmp_path: Path) -> None:
    folder = server(tmp_path / "fed", settings(), ABC, quorum=1.0, offences=1)
    run = conduct(folder, loop((When("b"), tampered_payload)))
    cohorts = [line["cohort"] for line in records.lines(run.home.run / "rounds.jsonl")]
    assert cohorts == [["a", "c"]] * 3
    assert [said for said in run.told if said.startswith("b: ")]


def test_who_declines_offends_nobody_and_is_asked_again(tmp_path: Path) -> None:
    carrier = loop(*[(When("b", round=at), declining()) for at in range(4)], rounds=5)
    run = conduct(server(tmp_path / "fed", settings(rounds=5), ABC), carrier)
    assert {r for r, _, name in carrier.rounds() if name == "b"} == {*range(5)}
    assert run.happened("declined") == [("b", at, "declined") for at in range(4)]
    assert stat(run)["b"] == {
        "site": "b",
        "state": "away",
        "examples": 6,
        "rounds": 1,
        "last": 5,
        "lag": 0,
        "bytes_up": stat(run)["a"]["bytes_up"] // 5,
        "refused": 0,
    }


def test_a_site_that_lost_its_state_is_asked_to_join_again_and_goes_on(tmp_path: Path) -> None:
    sites = stubs(*ABC)
    carrier = Loop({k: v.handle for k, v in sites.items()})
    lost = (When("a", "train", 1), first(lambda: setattr(sites["b"], "run", None)))
    carrier.faults = [lost]
    run = conduct(server(tmp_path / "fed", settings(every=3), ABC), carrier)
    assert run.happened("declined") == [("b", 1, "declined")]
    assert [name for _, _, name in carrier.rounds("join")] == [*ABC, "b"]
    cohorts = [line["cohort"] for line in records.lines(run.home.run / "rounds.jsonl")]
    assert cohorts == [[*ABC], ["a", "c"], [*ABC]]
    assert len(records.lines(run.home.run / "personal.jsonl")) == 3


def gone(carrier: Loop, *names: str) -> Fault:
    return first(lambda: carrier.away.update(names))


def test_a_site_that_comes_back_is_asked_to_join_again_and_goes_on(tmp_path: Path) -> None:
    carrier = loop()
    back = first(carrier.away.clear)
    carrier.faults = [(When("c", round=0), gone(carrier, "b")), (When("c", round=1), back)]
    run = conduct(server(tmp_path / "fed", settings(every=3), ABC), carrier)
    assert [name for _, _, name in carrier.rounds("join")] == [*ABC, "b"]
    assert [name for name, *_ in run.happened("joined")] == [*ABC, "b"]
    assert [name for r, _, name in carrier.rounds() if r == 1] == ["a", "c"]
    assert [name for r, _, name in carrier.rounds() if r == 2] == [*ABC]
    assert run.deployment.registry.names == [*ABC]


def test_a_site_that_comes_back_with_other_data_is_refused(tmp_path: Path) -> None:
    sites = stubs(*ABC)
    carrier = Loop({k: v.handle for k, v in sites.items()})

    def changes() -> None:
        carrier.away.clear()
        sites["b"].weight = 8

    carrier.faults = [
        (When("c", round=0), gone(carrier, "b")),
        (When("c", round=1), first(changes)),
    ]
    run = conduct(server(tmp_path / "fed", settings(every=3), ABC), carrier)
    assert run.happened("refused") == [("b", 0, "bad-weight")] * 3
    assert [r for r, _, name in carrier.rounds() if name == "b"] == [0]
    assert any("it has 8 training examples, had 6" in said for said in run.told)
    assert run.deployment.registry.weights()["b"] == 6


def newcomer(folder: Path, carrier: Loop, name: str) -> Callable[[], None]:
    """A site is added, and comes."""

    def act() -> None:
        files.write(folder / "sites" / f"{name}.pub", b"a key")
        carrier.sites[name] = Stub(10, 3).handle

    return act


def test_a_site_that_is_added_gets_the_next_number_whatever_its_name(tmp_path: Path) -> None:
    folder, carrier = server(tmp_path / "fed", settings(), ABC), loop()
    carrier.faults = [(When("b", round=0), first(newcomer(folder, carrier, "aa")))]
    run = conduct(folder, carrier)
    assert run.deployment.registry.numbers() == {"a": 0, "b": 1, "c": 2, "aa": 3}
    clients = {work.client for name, work in carrier.asked if name == "aa"}
    assert clients == {3}
    lines = records.lines(run.home.run / "rounds.jsonl")
    assert ["aa" in line["cohort"] for line in lines] == [False, True, True]
    assert lines[1]["cohort"] == ["a", "b", "c", "aa"]  # by their numbers
    assert {row["client"] for row in records.lines(run.home.run / "personal.jsonl")} == {*ABC, "aa"}
    assert stat(run)["aa"]["rounds"] == 2


def test_a_site_that_comes_while_others_tune_tunes_too(tmp_path: Path) -> None:
    folder, carrier = server(tmp_path / "fed", settings(), ABC), loop()
    act = newcomer(folder, carrier, "d")
    carrier.faults = [
        (When("a", "personalise"), first(act)),
        (When("c", "personalise"), silent),
    ]
    run = conduct(folder, carrier)
    assert any(said.startswith("no personal adapter at c:") for said in run.told)
    rows = records.lines(run.home.run / "personal.jsonl")
    assert {row["client"]: row["folder"] for row in rows} == {"a": "a", "b": "b", "d": "d"}
    newcomers = {row["client"]: row["newcomer"] for row in read(run.home.run).clients}
    assert newcomers == {"a": False, "b": False, "c": False, "d": True}


def test_the_answer_of_a_site_that_was_revoked_meanwhile_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    carrier = loop((When("b", round=1), first(lambda: kits.revoke("b", folder))))
    run = conduct(server(folder, settings(), ABC), carrier)
    assert run.happened("failed") == [("b", 1, None)]
    assert ("b", 1, None) not in run.happened("accepted")
    cohorts = [line["cohort"] for line in records.lines(run.home.run / "rounds.jsonl")]
    assert cohorts == [[*ABC], ["a", "c"], ["a", "c"]]
    after = [w for name, w in carrier.asked if name == "b" and (w.round, w.kind) > (1, "train")]
    assert after == []
    assert stat(run)["b"]["state"] == "revoked"
    # nobody waits for it, and those who are left end the run
    assert not [said for said in run.told if "resume" in said]
    assert {row["client"] for row in records.lines(run.home.run / "evaluation.jsonl")} == {"a", "c"}


def test_an_answer_that_came_before_the_revocation_counts(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    carrier = loop((When("c", round=1), first(lambda: kits.revoke("b", folder))))
    run = conduct(server(folder, settings(), ABC), carrier)
    cohorts = [line["cohort"] for line in records.lines(run.home.run / "rounds.jsonl")]
    assert cohorts == [[*ABC], [*ABC], ["a", "c"]]


@pytest.mark.parametrize("kind", ["personalise", "evaluate"])
def test_who_is_away_in_the_end_is_said_and_asked_again_on_resume(
    tmp_path: Path, unharmed: dict[str, Any], kind: str
) -> None:
    folder = server(tmp_path / "fed", settings(), ABC, attempts=3)
    run = conduct(folder, loop((When("b", kind, 3), silent)))
    what = "personal adapter at" if kind == "personalise" else "test of"
    assert [said for said in run.told if "resume" in said] == [
        f"no {what} b: `fedgen resume` asks again"
    ]
    tested = {row["client"] for row in records.lines(run.home.run / "evaluation.jsonl")}
    assert tested == {"a", "c"}
    assert headline(read(run.home.run))  # a report can be made of it
    assert "finished" in next(iter(status.summarize_status(folder)))
    again = loop()
    run = conduct(folder, again)
    assert {name for name, work in again.asked if work.kind != "join"} == {"b"}
    found = outcome(run.home.run)
    if kind == "evaluate":  # that round's validation went without it
        assert {*found["rounds"].pop()["validation"]["clients"]} == {"a", "c"}
        assert found["rounds"] == unharmed["rounds"][:-1]
        found["rounds"] = unharmed["rounds"]
    assert found == unharmed


def test_the_pauses_of_the_last_stages_are_bounded(tmp_path: Path) -> None:
    carrier = loop((When("b", "personalise"), silent), (When("c", "evaluate", 3), silent))
    conduct(server(tmp_path / "fed", settings(every=3), ABC, attempts=4), carrier)
    assert [name for _, _, name in carrier.rounds("personalise")] == [*ABC, "b", "b", "b"]
    asked = [name for _, _, name in carrier.rounds("evaluate")]
    assert asked.count("c") == 1 + 2 * 4  # of the last round, and of two models, four times
    assert asked.count("a") == 3


def test_a_finished_run_asks_nobody_anything(tmp_path: Path, unharmed: dict[str, Any]) -> None:
    folder = server(tmp_path / "fed", settings(), ABC)
    run = conduct(folder, loop())
    assert next(iter(status.summarize_status(folder))).endswith("round 3 of 3, finished")
    assert {row["site"]: (row["rounds"], row["lag"]) for row in shown(folder)} == dict.fromkeys(
        ABC, (3, 0)
    )
    again = loop()
    assert outcome(conduct(folder, again).home.run) == unharmed
    assert {work.kind for _, work in again.asked} <= {"join"}
    assert run.home.terms == conduct(folder, loop()).home.terms


SUMS = {"total": 1.0, "count": 20.0, "words": 9.0}
LIES: dict[str, Any] = {
    "nothing": None,
    "no words": {"total": 1.0, "count": 20.0},
    "more": {**SUMS, "client": 3.0},
    "of nothing": {**SUMS, "count": 0.0},
    "not finite": {**SUMS, "total": float("inf")},
    "in words": {**SUMS, "total": "1"},
}


@pytest.mark.parametrize("lie", LIES)
def test_sums_that_cannot_be_are_refused_and_the_others_count(tmp_path: Path, lie: str) -> None:
    carrier = loop((When("b", "evaluate", 1), saying(validation=LIES[lie])))
    run = conduct(server(tmp_path / "fed", settings(), ABC), carrier, until=2)
    assert run.happened("refused") == [("b", 1, "bad-numbers")]
    lines = records.lines(run.home.run / "rounds.jsonl")
    assert [[*line["validation"]["clients"]] for line in lines] == [["a", "c"], [*ABC]]


TALES: dict[str, dict[str, Any]] = {
    "endless": {"seconds": float("inf")},
    "beyond floats": {"seconds": 10**400},
    "before it began": {"seconds": -1.0},
    "no losses": {"validation": []},
    "losses in words": {"validation": ["1.5"]},
    "an epoch that was not": {"chosen": 2},
    "no epoch": {"chosen": True},
    "more than all of its adapter": {"share": 1.5},
    "no share of its adapter": {"share": -0.1},
    "no test": {"test": {}},
}


def once(fault: Fault) -> Fault:
    """The next time all is right."""
    left = [fault]

    def way(carrier: Loop, work: WorkRequest, right: Reply) -> list[Reply]:
        return left.pop()(carrier, work, right) if left else [right]

    return way


@pytest.mark.parametrize("tale", TALES)
def test_a_tuning_that_cannot_be_is_refused_and_asked_for_again(
    tmp_path: Path, unharmed: dict[str, Any], tale: str
) -> None:
    carrier = loop((When("b", "personalise"), once(saying(**TALES[tale]))))
    run = conduct(server(tmp_path / "fed", settings(), ABC), carrier)
    assert run.happened("refused") == [("b", 3, "bad-numbers")]
    assert outcome(run.home.run) == unharmed


def test_a_carrier_that_breaks_in_a_round_costs_an_attempt_and_nothing_else(
    tmp_path: Path, unharmed: dict[str, Any]
) -> None:
    def breaks(*_: Any) -> Any:
        raise CarrierError("Flower's server is away")

    folder = server(tmp_path / "fed", settings(), ABC)
    with pytest.raises(CarrierError):
        conduct(folder, loop((When("b", round=1), breaks)))
    again = loop()
    run = conduct(folder, again)
    assert {(r, a) for r, a, _ in again.rounds()} == {(1, 1), (2, 0)}
    assert outcome(run.home.run) == unharmed
