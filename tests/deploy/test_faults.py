"""Faults of a real federation: every process is killed, held up or cut off once, at work.

As all sites count in every round, the model at the end is that of a run without a fault.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from fedgen_edge.runs import records
from support.federation import NGINX, Federation, Running, federation, personal, rounds, said, until
from support.sites import NAMES

pytestmark = pytest.mark.skipif(
    not NGINX, reason="nginx is not installed (Debian: apt install nginx-light)"
)
ADAPTER = "adapter_model.safetensors"
ROUNDS = 6
DEADLINE = 20.0
"""Seconds: many times what a round takes here."""
AT_WORK = 0.1
"""Seconds of a processor after which a trainer that was idle is in the midst of its training."""
BITS = 20_000
"""Bytes that a site has sent only if an update of 34,176 is on its way."""


@dataclass
class Faults:
    """What happens to a federation, a round each."""

    made: Federation
    server: Running
    sites: dict[str, Running]
    round: int = 0
    """Counted from 0."""

    def trainer(self, name: str) -> psutil.Process:
        return self.sites[name].child("fedgen_edge.deploy.site.trainer")

    def opened(self, attempt: int = 0) -> None:
        """Wait until an attempt at this round is open."""
        wanted = self.round, attempt
        until(lambda: wanted in {(x["round"], x["attempt"]) for x in self.made.audit("opened")})

    def committed(self) -> None:
        """Wait for this round; from here it is the next."""
        until(lambda: len(records.lines(self.made.run / "rounds.jsonl")) > self.round)
        self.round += 1

    def takes(self, name: str) -> list[int]:
        """Attempts at this round in which a site's update was accepted."""
        found = self.made.audit("accepted")
        return [x["attempt"] for x in found if (x["site"], x["round"]) == (name, self.round)]

    def at_work(self, name: str) -> psutil.Process:
        """A site's trainer, once it trains."""
        trainer = self.trainer(name)
        before = trainer.cpu_times().user
        until(lambda: trainer.cpu_times().user > before + AT_WORK)
        assert not self.takes(name)
        return trainer


def a_trainer_is_killed(faults: Faults) -> None:
    faults.opened()
    faults.at_work("north").kill()
    faults.opened(1)
    faults.sites["north"].says("the trainer ended (killed by SIGKILL): starting it again")
    faults.committed()


def a_trainer_is_late(faults: Faults) -> None:
    """It answers once its round was abandoned and the next attempt is open."""
    faults.opened()
    trainer = faults.trainer("east")
    trainer.suspend()
    assert not faults.takes("east")
    faults.opened(1)
    trainer.resume()
    faults.committed()


def the_network_of_a_site_is_cut(faults: Faults) -> None:
    """In its upload, until the others are done."""
    wire = faults.made.wires["west"]
    wire.hold(BITS)
    until(wire.held.is_set)
    wire.cut()
    assert not faults.takes("west")
    until(lambda: faults.takes("east") and faults.takes("north"))
    wire.mend()
    faults.committed()


def flowers_server_is_killed(faults: Faults) -> None:
    faults.opened()
    faults.at_work("west")
    faults.server.child("flower-superlink").kill()
    faults.server.says("the SuperLink ended (status -9")
    faults.committed()


def the_server_is_killed(faults: Faults) -> None:
    """And Flower's server and the proxy with it; it goes on with less patience."""
    faults.opened()
    faults.at_work("west")
    faults.server.kill()
    faults.made.plan(attempts=2)
    faults.server = faults.made.serve("resume")
    faults.committed()


def all_sites_are_killed(faults: Faults) -> None:
    """One in training, one in its upload, one when its update was taken and it does not know.

    The server gives up, and goes on when they are back.
    """
    made, wire = faults.made, faults.made.wires["west"]
    wire.hold(BITS)
    faults.opened()
    faults.at_work("east").suspend()
    until(lambda: wire.held.is_set() and faults.takes("north"))
    for site in faults.sites.values():
        site.kill()
    assert not faults.takes("east") + faults.takes("west")
    wire.release()
    assert faults.server.ended() == 2
    *_, last = faults.server.text.strip().splitlines()
    assert re.fullmatch(r"fedgen: round 6 .* of the 3 updates that it needs, .*", last), last
    made.plan(attempts=6)
    faults.server = made.serve("resume")
    faults.sites = {name: made.join(name) for name in NAMES}
    faults.committed()


FAULTS = (
    a_trainer_is_killed,
    a_trainer_is_late,
    the_network_of_a_site_is_cut,
    flowers_server_is_killed,
    the_server_is_killed,
    all_sites_are_killed,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("faults")
    with federation(folder) as made:
        made.make(
            rounds(ROUNDS, epochs=5), quorum=1.0, deadline=DEADLINE, gather=120.0, back_off=1.0
        )
        said("run", made.recipe, "--out", folder / "simulation")
        faults = Faults(made, made.serve(), {name: made.join(name) for name in NAMES})
        for fault in FAULTS:
            fault(faults)
        assert faults.server.ended() == 0, faults.server.text
        yield made


def test_the_model_is_that_of_a_run_without_a_fault(made: Federation) -> None:
    simulation = made.folder / "simulation" / "adapters"
    found = made.run / "adapters" / "global" / ADAPTER
    assert found.read_bytes() == (simulation / "global" / ADAPTER).read_bytes()
    for name in NAMES:
        own = personal(made.kit(name)) / ADAPTER
        assert own.read_bytes() == (simulation / "clients" / name / ADAPTER).read_bytes()


def test_every_round_was_committed_once(made: Federation) -> None:
    assert [line["round"] for line in made.audit("committed")] == [*range(ROUNDS)]
    done = records.lines(made.run / "rounds.jsonl")
    assert [line["round"] for line in done] == [*range(1, ROUNDS + 1)]
    assert all(line["cohort"] == [*NAMES] for line in done)


def test_nobody_counts_twice_in_a_round(made: Federation) -> None:
    last = {line["round"]: line["attempt"] for line in made.audit("opened")}
    counted = [x for x in made.audit("accepted") if x["attempt"] == last[x["round"]]]
    took = Counter((line["round"], line["site"]) for line in counted)
    assert took == Counter({(number, name): 1 for number in range(ROUNDS) for name in NAMES})


def test_a_site_that_is_asked_again_says_the_same(made: Federation) -> None:
    by_work: dict[tuple[int, str], set[str]] = {}
    for line in made.audit("accepted"):
        by_work.setdefault((line["round"], line["site"]), set()).add(line["payload"])
    assert all(len(payloads) == 1 for payloads in by_work.values())
    assert len(made.audit("accepted")) > ROUNDS * len(NAMES)  # some were asked again
    assert made.audit("refused") == []
