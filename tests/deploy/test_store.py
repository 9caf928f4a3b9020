"""A site's state: whatever stops the site, it remembers what counts, and answers the same."""

import os
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgen_edge.deploy.site import site as sites_room
from fedgen_edge.deploy.site import store
from fedgen_edge.deploy.site.site import Site, open_site
from fedgen_edge.network.messages import digest
from fedgen_edge.types import Leaves
from support.damage import damages, mistake
from support.sites import RUN, Server, ask, kit, work


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return open_site(kit(tmp_path_factory.mktemp("kits") / "east", "east"))


@pytest.fixture
def site(opened: Site, tmp_path: Path) -> Site:
    """In the run, with a state of its own."""
    site = replace(opened, state=store.open_store(tmp_path / "state"))
    assert ask(site, work(site, "join")).refused is None
    return site


def equal(one: Leaves, other: Leaves) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_what_is_asked_again_is_answered_from_the_disk(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = work(site, "train", site.start)
    first = ask(site, asked)
    monkeypatch.setattr(sites_room, "_check_update", None)  # a second training would fail
    again = ask(site, replace(asked, attempt=1))
    assert (again.payload, again.said, again.attempt) == (first.payload, first.said, 1)
    for other in ({"round": 1}, {"client": 1}, {"accepted": digest(first.payload)}):
        assert ask(site, replace(asked, **other)).refused == "failed"  # it would train


def remembered(site: Site, accepted: str | None) -> Leaves | None:
    return site.state.get_run_store(RUN).load_client_state(accepted)


def test_memory_is_that_of_the_last_update_that_counts(site: Site) -> None:
    adapter = site.start
    server = Server([site])
    first = server.ask(0, "train", 0, adapter)
    # the server crashed before its commit: nothing counts yet
    assert remembered(site, None) == {}
    server.count(0, first)
    second = server.ask(0, "train", 1, adapter)
    kept = [remembered(site, digest(a.payload)) or {} for a in (first, second)]
    assert kept[0].keys() == kept[1].keys()
    assert all(name.startswith("kept:") for name in kept[0])
    assert not equal(*kept)
    # the second did not count, and two rounds went by without this site
    late = server.ask(0, "train", 4, adapter)
    assert equal(remembered(site, server.accepted[0]) or {}, kept[0])
    assert remembered(site, digest(second.payload)) is None  # it can never count now
    # what was made from the first update's memory differs from what is made of none
    fresh = ask(site, work(site, "train", adapter, round=4))
    assert fresh.payload != late.payload


def test_updates_that_can_no_longer_count_are_deleted(site: Site) -> None:
    adapter, server = site.start, Server([site])
    answers = []
    for r in range(5):
        answers.append(server.ask(0, "train", r, adapter))
        server.count(0, answers[-1])
    there = {p.name[:5] for p in site.state.get_run_store(RUN).folder.glob("trained/*")}
    assert there == {"00002", "00003", "00004"}
    # a server whose last commit was damaged goes on from the one before
    server.accepted[0] = digest(answers[2].payload)
    assert server.ask(0, "train", 3, adapter).payload == answers[3].payload


def test_a_site_that_lost_its_disk_goes_on_as_one_that_kept_nothing(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = site.start
    lost = ask(site, work(site, "train", adapter, round=2, accepted="0" * 64))
    assert "going on as a site that kept nothing" in capsys.readouterr().err
    assert lost.payload == ask(site, work(site, "train", adapter, round=2)).payload


def test_damaged_memory_is_refused_by_its_name(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    server, adapter = Server([site]), site.start
    server.count(0, server.ask(0, "train", 0, adapter))
    (path,) = site.state.get_run_store(RUN).folder.glob("trained/*/memory.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    more = {"round": 1, "accepted": server.accepted[0]}
    answer = ask(site, work(site, "train", adapter, **more))
    assert (answer.refused, answer.said) == ("failed", {"reason": "CheckpointError"})
    assert str(path) in capsys.readouterr().err


def test_only_its_owner_may_look_into_a_sites_state(site: Site) -> None:
    assert stat.S_IMODE(site.state.folder.stat().st_mode) == 0o700


def story(site: Site, adapter: Leaves) -> list[Any]:
    """Two rounds, of which the first does not count; then all the rest."""
    server = Server([site])
    told = [server.ask(0, "join", 0)]
    told += [server.ask(0, "train", 0, adapter), server.ask(0, "train", 1, adapter)]
    server.count(0, told[-1])
    told += [server.ask(0, kind, 2, adapter) for kind in ("train", "evaluate", "personalise")]
    shown = [({k: v for k, v in a.said.items() if k != "seconds"}, a.payload) for a in told]
    personal = site.state.get_run_store(RUN).personal_folder / "adapter_model.safetensors"
    return [*shown, personal.read_bytes()]


def killed_at(point: int, play: Callable[[], object]) -> bool:
    """Play in a child that is killed when it would make its nth write sure."""
    child = os.fork()
    if not child:
        real, seen = os.fsync, [0]

        def dies(handle: int) -> None:
            seen[0] += 1
            if seen[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = dies
        try:
            play()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_write_and_asked_again_a_site_answers_the_same(tmp_path: Path) -> None:
    short = {"steps": 1}
    site = open_site(kit(tmp_path / "kit", "east", training=short, personal={**short, "epochs": 1}))
    adapter = site.start
    expected = story(site, adapter)
    assert story(site, adapter) == expected  # from the disk
    point, alive = 0, True
    while alive:
        point += 1
        own = replace(site, state=store.open_store(tmp_path / f"{point}"))
        alive = killed_at(point, lambda own=own: story(own, adapter))
        back = replace(own, state=store.open_store(own.state.folder))
        assert story(back, adapter) == expected, point
        assert not list(back.state.folder.rglob(".*"))
    assert point > 20  # every write of join, train and personalise was one


def test_a_damaged_update_is_made_again(site: Site) -> None:
    asked = work(site, "train", site.start)
    first = ask(site, asked)
    (path,) = site.state.get_run_store(RUN).folder.glob("trained/*/payload.safetensors")
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert ask(site, asked).payload == first.payload
    assert digest(path.read_bytes()) == digest(first.payload)


def test_stopped_while_it_tunes_anew_a_site_says_nothing_of_an_adapter_that_is_gone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    asked = work(site, "personalise", site.start, round=3)
    first = ask(site, asked)
    path = site.state.get_run_store(RUN).personal_folder / "adapter_model.safetensors"
    content = path.read_bytes()
    with monkeypatch.context() as stopping:
        stopping.setattr(store.RunStore, "record_tuning", stops)
        with pytest.raises(KeyboardInterrupt):
            ask(site, replace(asked, round=2))
    assert path.read_bytes() != content
    assert ask(site, asked).said["test"] == first.said["test"]
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["run.json", "trained.json", "personal.json"])
def test_a_damaged_note_is_as_none(site: Site, name: str) -> None:
    asked = store.RequestKey(0, 0, "b" * 64, None)
    past = site.state.get_run_store(RUN)
    past.save_update(store.StoredUpdate(asked, b"payload", {}, {"loss": 1.0}))
    past.begin_tuning()
    past.record_tuning(asked, {"chosen": 0})
    path = next(site.state.folder.rglob(name))
    for content in damages(path):
        path.write_bytes(content)
        acts = (
            site.state.get_run,
            partial(past.find_answer, asked),
            partial(past.find_tuning, asked),
        )
        for act in (*acts, partial(past.is_update_missing, "c" * 64)):
            assert mistake(act, content) == ""
    path.write_bytes(b"[" * 5000)
    assert {"run.json": site.state.get_run, "trained.json": partial(past.find_answer, asked)}.get(
        name, partial(past.find_tuning, asked)
    )() is None
