"""A server that dies around a commit: what sites keep is that of the rounds that count."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedgen_edge.deploy.server.audit import Audit
from fedgen_edge.deploy.site import store
from fedgen_edge.deploy.site.site import Site, open_site
from fedgen_edge.runs import federate
from support.loop import Loop, When, conduct, first, hurry, model, outcome, server, silent
from support.sites import NAMES, kit, recipe

MORE: dict[str, Any] = {
    "federation": {"rounds": 3, "cohort": None},
    "evaluation": {"sample_tokens": 0, "every_rounds": 3},
    "personal": {"epochs": 1},
}


class DiedError(Exception):
    """The server's process, at that moment."""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    """The three sites of FedPer, each with more to keep after every round."""
    folder = tmp_path_factory.mktemp("kits")
    return [open_site(kit(folder / name, name, **MORE)) for name in NAMES]


def fresh(kits: list[Site], folder: Path) -> dict[str, Site]:
    """The same, each with a state of its own."""
    return {s.name: replace(s, state=store.open_store(folder / s.name / "state")) for s in kits}


def loop(sites: dict[str, Site]) -> Loop:
    return Loop({name: site.handle for name, site in sites.items()})


def ended(sites: dict[str, Site], folder: Path, carrier: Loop | None = None) -> dict[str, Any]:
    """Go on to the end; all that the server and the sites have then."""
    run = conduct(folder, carrier or loop(sites))
    own = {
        name: model(site.state.get_run_store(run.home.terms.run).personal_folder)
        for name, site in sites.items()
    }
    return {**outcome(run.home.run), "own": own}


@pytest.fixture(scope="module")
def unbroken(kits: list[Site], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    fed = server(folder / "fed", recipe(None, **MORE), NAMES)
    return ended(fresh(kits, folder), fed)


def between_record_and_commit(patch: pytest.MonkeyPatch) -> None:
    """The record of the second round is there, and its checkpoint is not."""
    real: Callable[..., None] = federate.commit

    def dies(run: Path, state: Any, *rest: Any) -> None:
        if state.round == 2:
            raise DiedError
        real(run, state, *rest)

    patch.setattr(federate, "commit", dies)


def at_line(event: str, count: int, *, after: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """Before or after a line of the audit log."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        real, seen = Audit.write, []

        def dies(self: Audit, name: str, **fields: Any) -> None:
            seen.extend([name] if name == event else [])
            if name == event and len(seen) == count and not after:
                raise DiedError
            real(self, name, **fields)
            if name == event and len(seen) == count:
                raise DiedError

        patch.setattr(Audit, "write", dies)

    return arrange


MOMENTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "between record and commit": between_record_and_commit,
    "after the commit, before its line": at_line("committed", 2, after=False),
    "after the commit and its line": at_line("committed", 2, after=True),
    "before the last acceptance's line": at_line("accepted", 6, after=False),
    "between the last acceptance and the commit": at_line("accepted", 6, after=True),
    "after the next round was opened": at_line("opened", 3, after=True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sites_keep_what_came_with_the_rounds_that_count(
    kits: list[Site], unbroken: dict[str, Any], tmp_path: Path, moment: str
) -> None:
    sites = fresh(kits, tmp_path / "sites")
    folder = server(tmp_path / "fed", recipe(None, **MORE), NAMES)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        MOMENTS[moment](patch)
        with pytest.raises(DiedError):
            conduct(folder, loop(sites))
    assert ended(sites, folder) == unbroken


def test_an_attempt_that_was_abandoned_leaves_sites_as_they_were(
    kits: list[Site], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    sites, few = fresh(kits, tmp_path / "sites"), NAMES[1:]
    carrier = loop(sites)
    carrier.faults = [(When(name, round=2, attempt=0), silent) for name in few]
    folder = server(tmp_path / "fed", recipe(None, **MORE), NAMES)
    assert ended(sites, folder, carrier) == unbroken
    assert {attempt for r, attempt, _ in carrier.rounds() if r == 2} == {0, 1}


def test_a_damaged_checkpoint_takes_sites_back_with_it(
    kits: list[Site], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    sites = fresh(kits, tmp_path / "sites")
    folder = server(tmp_path / "fed", recipe(None, **MORE), NAMES)
    conduct(folder, loop(sites), until=2)
    target = folder / "run" / "checkpoints" / "00002" / "server.safetensors"
    target.write_bytes(target.read_bytes()[:-5])
    assert ended(sites, folder) == unbroken


def without_west(kits: list[Site], folder: Path) -> dict[str, Any]:
    """What is left where the third site never heard of the second round."""
    sites = fresh(kits, folder)
    carrier = loop(sites)
    hears = carrier.sites["west"]

    def deaf(text: str, payload: bytes) -> tuple[str, bytes]:
        second = '"kind":"train"' in text and '"round":1' in text
        return ("", b"") if second else hears(text, payload)

    carrier.sites["west"] = deaf
    carrier.faults = [(When("west", round=1), silent)]
    return ended(sites, server(folder / "fed", recipe(None, **MORE), NAMES), carrier)


TOO_LATE: dict[str, list[When]] = {
    "its answer came too late": [When("west", round=1)],
    "it counted in an attempt that was abandoned": [
        When("east", round=1, attempt=0),
        When("north", round=1, attempt=0),
        When("west", round=1, attempt=1),
    ],
}


@pytest.mark.parametrize("how", TOO_LATE)
def test_a_site_whose_update_does_not_count_goes_on_from_its_last_that_does(
    kits: list[Site], unbroken: dict[str, Any], tmp_path: Path, how: str
) -> None:
    sites = fresh(kits, tmp_path / "sites")
    carrier = loop(sites)
    carrier.faults = [(when, silent) for when in TOO_LATE[how]]
    found = ended(sites, server(tmp_path / "fed", recipe(None, **MORE), NAMES), carrier)
    assert found == without_west(kits, tmp_path / "deaf")
    assert found != unbroken


def test_a_site_that_lost_its_state_joins_again_and_goes_on_as_one_that_kept_nothing(
    kits: list[Site], unbroken: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sites = fresh(kits, tmp_path / "sites")
    west = sites["west"]

    def lost() -> None:
        west.state.folder.rename(tmp_path / "lost")
        store.open_store(west.state.folder)

    carrier = loop(sites)
    carrier.faults = [(When("east", round=1), first(lost))]
    folder = server(tmp_path / "fed", recipe(None, **MORE), NAMES)
    found = ended(sites, folder, carrier)
    cohorts = [row["cohort"] for row in found["rounds"]]
    assert cohorts == [[*NAMES], ["east", "north"], [*NAMES]]
    assert "going on as a site that kept nothing" in capfd.readouterr().err
    assert found["own"].keys() == unbroken["own"].keys()
    assert found["own"]["west"] != unbroken["own"]["west"]
    assert found["own"]["west"]
