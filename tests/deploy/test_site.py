"""A site does what a simulation's client does, bit for bit, and nothing else that it is told."""

import json
import os
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from fedgen_edge.config import to_toml
from fedgen_edge.deploy import site as sites_room
from fedgen_edge.deploy import store
from fedgen_edge.deploy.settings import digest as recipe_digest
from fedgen_edge.deploy.site import Site, open_site
from fedgen_edge.engines.exchange import Answer, digest, line, read
from fedgen_edge.engines.serial import serial
from fedgen_edge.errors import ConfigError, DataError
from fedgen_edge.experiments.build import Experiment, build
from fedgen_edge.rounds import rounds, sample
from fedgen_edge.types import Leaves, Order, ServerState, Update
from fedgen_edge.uplink.transform import decode, encode
from sites import NAMES, RUN, Server, ask, kit, recipe, rows, terms, work, write_rows


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The three clients in one process."""
    path = write_rows(tmp_path_factory.mktemp("data") / "all.jsonl", rows())
    return build(recipe(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("kits")
    return [kit(folder / name, name) for name in NAMES]


@pytest.fixture
def sites(made: list[Path], tmp_path: Path) -> list[Site]:
    """The three sites, each with a state of its own."""
    opened = [open_site(folder) for folder in made]
    return [
        replace(site, state=store.open_state(tmp_path / site.name / "state")) for site in opened
    ]


@pytest.fixture
def site(sites: list[Site]) -> Site:
    """The first of them, in the run."""
    assert ask(sites[0], work(sites[0], "join")).refused is None
    return sites[0]


def federate(server: Server, simulation: Experiment) -> ServerState:
    """The rounds of a simulation, with sites for clients."""
    state, algorithm = simulation.start(), simulation.algorithm
    federation = simulation.settings.federation
    for number in range(len(server.sites)):
        server.ask(number, "join", 0)
    for r in range(federation.rounds):
        updates = []
        for number in sample(federation, len(server.sites), r):
            answer = server.ask(number, "train", r, state.adapter)
            server.count(number, answer)
            said, order = answer.said, Order((number,), r, state.adapter)
            delta, size = decode(answer.payload), len(answer.payload)
            updates.append(
                Update(order, delta, {}, float(said["weight"]), said["loss"], said["steps"], size)
            )
        state = algorithm.step(state, updates)
    return state


def equal(one: Leaves, other: Leaves) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_a_site_splits_what_it_holds_as_the_simulation_splits_its_client(
    sites: list[Site], simulation: Experiment
) -> None:
    for number, site in enumerate(sites):
        own, theirs = site.experiment, simulation
        for part in ("train", "validation", "test"):
            held = [getattr(e.holdings[n], part) for e, n in ((own, 0), (theirs, number))]
            texts = [
                [e.corpus.examples.texts[i] for i in indices]
                for e, indices in zip((own, theirs), held, strict=True)
            ]
            assert texts[0] == texts[1]
            assert texts[0]
            batches = [getattr(e.clients.shards[n], part) for e, n in ((own, 0), (theirs, number))]
            assert equal(*batches)


def test_sites_that_train_and_tune_end_as_the_simulation_bit_for_bit(
    sites: list[Site], simulation: Experiment
) -> None:
    memory: dict[int, Leaves] = {}
    simulated = simulation.remembering(memory)
    federation = simulation.settings.federation
    *_, commit = rounds(simulated.start(), simulated.algorithm, serial, simulated.train, federation)
    server = Server(sites)
    state = federate(server, simulation)
    assert equal(state.adapter, commit.state.adapter)
    assert len(memory) > 1  # what they kept was asked for again
    judged = simulated.validation(commit.state)
    answers = [server.ask(c, "evaluate", state.round, state.adapter) for c in range(3)]
    assert sum(a.said["validation"]["total"] for a in answers) == judged["total"]
    for number, site in enumerate(sites):
        own = simulated.own(commit.state, memory.get(number, {}))
        shard = simulated.clients.shards[number]
        assert answers[number].said["test"] == simulated.sums(own, shard.test)
        order = Order((number,), state.round, commit.state.adapter)
        tuned = simulated.tune([order], stacked=False)[0]
        said = server.ask(number, "personalise", state.round, state.adapter).said
        assert said["validation"] == tuned.history
        assert said["chosen"] == tuned.chosen
        assert said["test"] == simulated.sums(tuned.adapter, shard.test)
        folder = site.state.past(RUN).personal
        assert equal(simulation.task.model.load(folder), tuned.adapter)


def test_the_test_text_is_read_after_the_last_round_alone(
    site: Site, simulation: Experiment
) -> None:
    start = simulation.start().adapter
    assert {*ask(site, work(site, "evaluate", start, round=2)).said} == {"validation"}
    assert {*ask(site, work(site, "evaluate", start, round=3)).said} == {"validation", "test"}


def test_joining_says_counts_and_no_labels(site: Site, simulation: Experiment) -> None:
    holding, shard = simulation.holdings[0], simulation.clients.shards[0]
    answer = ask(site, work(site, "join"))
    assert answer.said == {
        "weight": len(shard.train["tokens"]),
        "train": len(holding.train),
        "validation": len(holding.validation),
        "test": len(holding.test),
        "items": int(shard.train["mask"].sum()),
    }
    assert answer.payload == b""


def test_what_is_asked_again_is_answered_from_the_disk(
    site: Site, simulation: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = work(site, "train", simulation.start().adapter)
    first = ask(site, asked)
    monkeypatch.setattr(sites_room, "WAYS", {**sites_room.WAYS})
    monkeypatch.setattr(sites_room, "_check_sent", None)  # a second training would fail
    again = ask(site, replace(asked, attempt=1))
    assert (again.payload, again.said, again.attempt) == (first.payload, first.said, 1)
    for other in ({"round": 1}, {"client": 1}, {"accepted": digest(first.payload)}):
        assert ask(site, replace(asked, **other)).refused == "failed"  # it would train


def remembered(site: Site, accepted: str | None) -> Leaves | None:
    return site.state.past(RUN).remembered(accepted)


def test_memory_is_that_of_the_last_update_that_counts(site: Site, simulation: Experiment) -> None:
    adapter = simulation.start().adapter
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


def test_updates_that_can_no_longer_count_are_deleted(site: Site, simulation: Experiment) -> None:
    adapter, server = simulation.start().adapter, Server([site])
    answers = []
    for r in range(5):
        answers.append(server.ask(0, "train", r, adapter))
        server.count(0, answers[-1])
    there = {p.name[:5] for p in site.state.past(RUN).folder.glob("trained/*")}
    assert there == {"00002", "00003", "00004"}
    # a server whose last commit was damaged goes on from the one before
    server.accepted[0] = digest(answers[2].payload)
    assert server.ask(0, "train", 3, adapter).payload == answers[3].payload


def test_a_site_that_lost_its_disk_goes_on_as_one_that_kept_nothing(
    site: Site, simulation: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = simulation.start().adapter
    lost = ask(site, work(site, "train", adapter, round=2, accepted="0" * 64))
    assert "going on as a site that kept nothing" in capsys.readouterr().err
    assert lost.payload == ask(site, work(site, "train", adapter, round=2)).payload


def test_damaged_memory_is_refused_by_its_name(
    site: Site, simulation: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    server, adapter = Server([site]), simulation.start().adapter
    server.count(0, server.ask(0, "train", 0, adapter))
    (path,) = site.state.past(RUN).folder.glob("trained/*/memory.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    more = {"round": 1, "accepted": server.accepted[0]}
    answer = ask(site, work(site, "train", adapter, **more))
    assert (answer.refused, answer.said) == ("failed", {"reason": "CheckpointError"})
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["train", "evaluate", "personalise"])
def test_another_run_is_refused_until_the_site_has_joined_it(
    site: Site, simulation: Experiment, kind: Any
) -> None:
    adapter, other = simulation.start().adapter, "f" * 32
    asked = replace(work(site, kind, adapter), terms=terms(site, other))
    assert ask(site, asked).refused == "wrong-run"
    assert ask(site, replace(work(site, "join"), terms=terms(site, other))).refused is None
    assert ask(site, asked).refused is None
    assert ask(site, work(site, kind, adapter)).refused == "wrong-run"
    assert (site.state.folder / "runs" / other).is_dir()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"recipe": "0" * 64}, "wrong-recipe"),
        ({"backbone": "0" * 64}, "wrong-backbone"),
        ({"protocol": 2}, "wrong-protocol"),
        ({"run": "../../../../etc"}, "malformed"),
        ({"run": "F" * 32}, "malformed"),
    ],
)
@pytest.mark.parametrize("kind", ["join", "train"])
def test_what_was_not_agreed_is_refused(
    site: Site, simulation: Experiment, kind: Any, change: dict[str, Any], code: str
) -> None:
    asked = work(site, kind, simulation.start().adapter)
    before = {*site.state.folder.rglob("*")}
    answer = ask(site, replace(asked, terms=replace(asked.terms, **change)))
    assert answer.refused == code
    assert answer.payload == b""
    assert {*site.state.folder.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [{"client": -1}, {"client": 10**12}, {"round": -1}, {"accepted": "../x"}],
)
def test_numbers_that_cannot_be_are_refused(
    site: Site, simulation: Experiment, change: dict[str, Any]
) -> None:
    asked = work(site, "train", simulation.start().adapter, **change)
    assert ask(site, asked).refused == "malformed"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"terms": {"protocol": 1}}', "x" * 70_000])
def test_a_line_that_is_no_work_is_answered_with_a_refusal(site: Site, text: str) -> None:
    answer = read(Answer, *site.handle(text, b"\0" * 9))
    assert answer.refused in {"malformed", "line-too-long"}


def harmed(harm: str, adapter: Leaves) -> bytes:
    """The adapter, not as it must be."""
    name = sorted(adapter)[0]
    changed = dict(adapter)
    if harm == "extra-leaf":
        changed["x" * len(name)] = changed.pop(name)
    elif harm == "not-finite":
        changed[name] = torch.full_like(changed[name], torch.inf)
    elif harm == "wrong-type":  # as long as it was
        changed[name] = changed[name].view(torch.int32)
    elif harm == "wrong-shape":
        changed[name] = changed[name][..., :-1]
    payload = save({k: v.contiguous() for k, v in sorted(changed.items())})
    return payload[:8] + b"\0" * (len(payload) - 8) if harm == "bad-header" else payload


@pytest.mark.parametrize("kind", ["train", "evaluate", "personalise"])
@pytest.mark.parametrize(
    "harm", ["extra-leaf", "not-finite", "wrong-type", "wrong-shape", "bad-header"]
)
def test_an_adapter_that_does_not_fit_is_never_loaded(
    site: Site, simulation: Experiment, kind: Any, harm: str
) -> None:
    whole = simulation.start().adapter
    shared = {k: v for k, v in whole.items() if k in site.shared}
    assert ask(site, work(site, kind, payload=harmed(harm, shared))).refused == harm
    if kind != "evaluate":  # which is of the backbone then
        assert ask(site, work(site, kind)).refused == "wrong-length"
    everything = ask(site, work(site, kind, payload=encode(whole)))
    # a private leaf is not the server's to set
    assert everything.refused == "payload-too-long"


def test_an_update_with_a_private_leaf_never_leaves(site: Site, simulation: Experiment) -> None:
    # a method that says one thing when the site opens, and another when it sends
    algorithm = replace(site.experiment.algorithm, sends=set)
    clients = replace(site.experiment.clients, algorithm=algorithm)
    leaking = replace(site, experiment=replace(site.experiment, clients=clients))
    answer = ask(leaking, work(leaking, "train", simulation.start().adapter))
    assert answer.refused == "private-leaf"
    assert answer.payload == b""
    assert not [*site.state.folder.rglob("trained/*")]
    assert ask(site, work(site, "train", simulation.start().adapter)).refused is None


def test_training_that_leaves_the_finite_numbers_sends_nothing(
    site: Site, simulation: Experiment
) -> None:
    settings = site.experiment.settings
    wild = replace(settings, training=replace(settings.training, optimiser="sgd", lr=1e38, clip=0))
    wild = replace(wild, personal=replace(wild.personal, lr=1e38, fallback=False))
    burst = replace(site, experiment=replace(site.experiment, settings=wild))
    for kind in ("train", "personalise"):
        answer = ask(burst, work(burst, kind, simulation.start().adapter))
        assert answer.refused == "diverged"
        assert answer.payload == b""
    assert not [*site.state.folder.rglob("*.safetensors")]


def test_a_failure_is_answered_by_its_class_and_says_nothing_of_the_data(
    site: Site,
    simulation: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(error: Exception) -> Callable[[Any, Any], Any]:
        def way(_: Any, __: Any) -> Any:
            raise error

        return way

    for error, told in (
        (ValueError("Mrs Smith, born 1950"), "ValueError"),
        (FileNotFoundError(2, "No such file", "/secret/name"), "FileNotFoundError: No such file"),
        (RuntimeError("shapes differ\nMrs Smith"), "RuntimeError: shapes differ"),
    ):
        monkeypatch.setattr(sites_room, "WAYS", {"train": fails(error)})
        answer = ask(site, work(site, "train", simulation.start().adapter))
        assert (answer.refused, answer.said) == ("failed", {"reason": told})
    assert "born 1950" in capsys.readouterr().err  # the site's own log has it all


def test_the_personal_adapter_is_pefts_and_is_said_of_again_from_the_disk(
    site: Site, simulation: Experiment
) -> None:
    asked = work(site, "personalise", simulation.start().adapter, round=3)
    first = ask(site, asked)
    assert first.payload == b""
    assert ask(site, replace(asked, attempt=4)).said == first.said  # the seconds too
    folder = site.state.past(RUN).personal
    told = json.loads((folder / "provenance.json").read_text())
    assert (told["client"], told["round"], told["method"]) == ("east", 3, "fedper")
    assert told["backbone_sha256"] == site.experiment.task.model.sha256
    plain = AutoModelForCausalLM.from_pretrained(site.experiment.task.model.folder)
    assert PeftModel.from_pretrained(plain, str(folder)).peft_config
    # another adapter is tuned anew, and replaces it
    before = load_file(folder / "adapter_model.safetensors")
    assert ask(site, replace(asked, round=2)).said["validation"] != first.said["validation"]
    assert not equal(load_file(folder / "adapter_model.safetensors"), before)


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
    personal = site.state.past(RUN).personal / "adapter_model.safetensors"
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
        own = replace(site, state=store.open_state(tmp_path / f"{point}"))
        alive = killed_at(point, lambda own=own: story(own, adapter))
        back = replace(own, state=store.open_state(own.state.folder))
        assert story(back, adapter) == expected, point
        assert not list(back.state.folder.rglob(".*"))
    assert point > 20  # every write of join, train and personalise was one


def test_the_recipes_digest_is_the_simulations(sites: list[Site], simulation: Experiment) -> None:
    path = simulation.settings.data.path
    assert path is not None
    assert {site.recipe for site in sites} == {recipe_digest(recipe(Path(path)))}


@pytest.mark.parametrize(
    ("more", "error", "named"),
    [
        ({"data": {"text_field": "body"}}, DataError, "data.text_field='body'"),
        ({"method": {"name": "local-only"}}, ConfigError, "method.name='local-only'"),
        ({"method": {"name": "centralised"}}, ConfigError, "method.name='centralised'"),
        ({"data": {"validation": 0}}, ConfigError, "data.validation=0"),
        ({"partition": {"minimum": 999}}, DataError, "partition.minimum=999"),
        ({"data": {"source": "images"}}, ConfigError, "data.names=()"),
    ],
)
def test_what_a_site_cannot_do_is_one_line_and_leaves_no_state(
    tmp_path: Path, more: dict[str, Any], error: type[Exception], named: str
) -> None:
    folder = kit(tmp_path / "east", "east", **more)
    with pytest.raises(error) as caught:
        open_site(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "state").exists()


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    (folder / "texts.jsonl").unlink()
    with pytest.raises(DataError, match=r"texts\.jsonl' does not exist"):
        open_site(folder)


def test_a_line_is_short_and_plain(site: Site, simulation: Experiment) -> None:
    text, payload = site.handle(*_spoken(site, simulation.start().adapter))
    assert "\n" not in text
    assert len(payload) == site.largest
    assert "payload" not in json.loads(text)


def _spoken(site: Site, adapter: Leaves) -> Sequence[Any]:
    asked = work(site, "train", adapter)
    return line(asked), asked.payload


def test_recipe_and_kit_are_written_as_they_are_read(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    assert (folder / "recipe.toml").read_text() == to_toml(recipe(None))
