"""A site does what a simulation's client does, bit for bit, and nothing else that it is told."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from fedgen_edge.algorithms.share import share_all
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.config import to_toml
from fedgen_edge.deploy.settings import hash_settings as recipe_digest
from fedgen_edge.deploy.site import site as sites_room
from fedgen_edge.deploy.site import store
from fedgen_edge.deploy.site.site import Site, open_site
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.errors import ConfigError, DataError
from fedgen_edge.federation.rounds import rounds, sample_clients
from fedgen_edge.network.messages import Answer, decode_message, encode_line
from fedgen_edge.runs.build import Experiment, build
from fedgen_edge.types import Leaves, Order, ServerState, Update
from support.sites import NAMES, RUN, Server, ask, kit, recipe, rows, terms, work, write_rows


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
        replace(site, state=store.open_store(tmp_path / site.name / "state")) for site in opened
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
        for number in sample_clients(federation, len(server.sites), r):
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
    simulated = simulation.with_client_states(memory)
    federation = simulation.settings.federation
    *_, commit = rounds(
        simulated.start(), simulated.algorithm, run_serially, simulated.train, federation
    )
    server = Server(sites)
    state = federate(server, simulation)
    assert equal(state.adapter, commit.state.adapter)
    assert len(memory) > 1  # what they kept was asked for again
    judged = simulated.validation(commit.state)
    answers = [server.ask(c, "evaluate", state.round, state.adapter) for c in range(3)]
    assert sum(a.said["validation"]["total"] for a in answers) == judged["total"]
    for number, site in enumerate(sites):
        own = simulated.get_client_model(commit.state, memory.get(number, {}), number)
        shard = simulated.clients.shards[number]
        assert answers[number].said["test"] == simulated.evaluate_client(own, shard.test)
        order = Order((number,), state.round, commit.state.adapter)
        tuned = simulated.tune([order], stacked=False)[0]
        said = server.ask(number, "personalise", state.round, state.adapter).said
        assert said["validation"] == tuned.history
        assert said["chosen"] == tuned.chosen
        assert said["test"] == simulated.evaluate_client(tuned.adapter, shard.test)
        folder = site.state.get_run_store(RUN).personal_folder
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
        ({"drawn": "0" * 64}, "wrong-start"),
        ({"protocol": 1}, "wrong-protocol"),
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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"terms": {"protocol": 2}}', "x" * 70_000])
def test_a_line_that_is_no_work_is_answered_with_a_refusal(site: Site, text: str) -> None:
    answer = decode_message(Answer, *site.handle(text, b"\0" * 9))
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
    shared = {k: v for k, v in whole.items() if k in site.shared_shapes}
    assert ask(site, work(site, kind, payload=harmed(harm, shared))).refused == harm
    if kind != "evaluate":  # which is of the backbone then
        assert ask(site, work(site, kind)).refused == "wrong-length"
    everything = ask(site, work(site, kind, payload=encode(whole)))
    # a private leaf is not the server's to set
    assert everything.refused == "payload-too-long"


def test_an_update_with_a_private_leaf_never_leaves(site: Site, simulation: Experiment) -> None:
    # a method that says one thing when the site opens, and another when it sends
    algorithm = replace(site.experiment.algorithm, sends=share_all)
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
    # decay alone takes A beyond the finite numbers in the first step
    training = replace(settings.training, optimizer="sgd", lr=1e38, clip=0, weight_decay=1e5)
    wild = replace(settings, training=training)
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
        monkeypatch.setattr(sites_room, "HANDLERS", {"train": fails(error)})
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
    folder = site.state.get_run_store(RUN).personal_folder
    told = json.loads((folder / "provenance.json").read_text())
    assert (told["client"], told["round"], told["method"]) == ("east", 3, "fedper")
    assert told["backbone_sha256"] == site.experiment.task.model.sha256
    plain = AutoModelForCausalLM.from_pretrained(site.experiment.task.model.folder)
    assert PeftModel.from_pretrained(plain, str(folder)).peft_config
    # another adapter is tuned anew, and replaces it
    before = load_file(folder / "adapter_model.safetensors")
    assert ask(site, replace(asked, round=2)).said["validation"] != first.said["validation"]
    assert not equal(load_file(folder / "adapter_model.safetensors"), before)


def test_the_recipes_digest_is_the_simulations(sites: list[Site], simulation: Experiment) -> None:
    path = simulation.settings.data.path
    assert path is not None
    assert {site.recipe for site in sites} == {recipe_digest(recipe(Path(path)))}


@pytest.mark.parametrize(
    ("more", "error", "named"),
    [
        ({"data": {"text_field": "body"}}, DataError, "data.text_field='body'"),
        ({"method": {"name": "local-only"}}, ConfigError, "method.name='local-only'"),
        ({"method": {"name": "fedbuff"}}, ConfigError, "method.name='fedbuff'"),
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
    assert len(payload) == site.max_payload_bytes
    assert "payload" not in json.loads(text)


def _spoken(site: Site, adapter: Leaves) -> Sequence[Any]:
    asked = work(site, "train", adapter)
    return encode_line(asked), asked.payload


def test_recipe_and_kit_are_written_as_they_are_read(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    assert (folder / "recipe.toml").read_text() == to_toml(recipe(None))
