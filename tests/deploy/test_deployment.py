"""A whole federation of real processes: three sites with keys, TLS, the proxy and Flower's server.

Strangers knock while it waits for its third site. FEDGEN_BACKBONE names the folder of another
backbone than the random one.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient
from safetensors.torch import load_file

from fedgen_edge.errors import CarrierError
from fedgen_edge.network.flower.environment import environment
from fedgen_edge.network.flower.http import FlowerServer
from fedgen_edge.runs import records
from support.federation import LONG, NGINX, Federation, Running, federation, personal, rounds, said
from support.flower_network import certificates, free_port, private
from support.sites import NAMES

pytestmark = pytest.mark.skipif(
    not NGINX, reason="nginx is not installed (Debian: apt install nginx-light)"
)
SLICE = 64
"""Bytes that no two adapters have in common: 16 trained numbers."""
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Done:
    """A federation that ran to its end, and what was seen on the way."""

    made: Federation
    simulation: Path
    during: str
    """What `fedgen status` said while strangers knocked."""
    printed: str
    """By `fedgen server`."""
    turned: dict[str, str]
    """What each stranger was told."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder, backbone = tmp_path_factory.mktemp("deployment"), os.environ.get("FEDGEN_BACKBONE")
    with federation(folder, backbone or "tiny") as made:
        made.make(rounds(3), gather=LONG, quorum=1.0)
        said("run", made.recipe, "--out", folder / "simulation")
        yield carried_out(made, folder / "simulation")


def carried_out(made: Federation, simulation: Path) -> Done:
    """Run it: strangers come before the third site, for which the first round waits."""
    server = made.serve()
    sites = [made.join(name) for name in NAMES[:2]]
    strangers = {
        "unregistered": made.start("stranger", client(unregistered(made))),
        "another CA": made.start("misled", client(misled(made))),
        "plaintext": plain(made),
    }
    for name in NAMES[:2]:
        server.says(f"{name} joined")
    strangers["unregistered"].says("does not let this site in")
    strangers["another CA"].says("not signed by this kit's ca.crt")
    strangers["plaintext"].says("400")
    turned = {name: each.text for name, each in strangers.items()}
    turned["control"], turned["no TLS"] = controlled(made, made.wires["east"].target), bare(made)
    during = said("status", made.server)
    sites.append(made.join(NAMES[2]))
    assert server.ended() == 0, server.text
    for site in sites:
        site.says("personal adapter at")
    return Done(made, simulation, during, server.text, turned)


def client(kit: Path) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from fedgen_edge.cli.main import main; main()",
        "client",
        str(kit),
    ]


def unregistered(made: Federation) -> Path:
    """A site's kit with a key that nobody has registered."""
    kit = made.bring(made.server / "kits" / "west", "stranger", made.wires["west"].target)
    private(kit / "key")
    return kit


def misled(made: Federation) -> Path:
    """A site's kit that trusts another authority."""
    kit = made.bring(made.server / "kits" / "west", "misled", made.wires["west"].target)
    certificates(kit)
    return kit


def plain(made: Federation) -> Running:
    """Flower's own client, without TLS and without a key."""
    program = str(Path(sys.executable).parent / "flower-supernode")
    home = environment(made.folder / "plain")
    return made.start(
        "plain",
        [program, "--insecure", "--superlink", f"localhost:{made.wires['east'].target}", "--port",
         str(free_port()), "--isolation", "process"],
        **home,
    )  # fmt: skip


def controlled(made: Federation, port: int) -> str:
    """What the control interface says at a port."""
    server = FlowerServer(f"localhost:{port}", made.server / "ca" / "ca.crt", 5.0)
    with server.make_client(ControlHttpClient) as control:
        try:
            with server.translate_errors():
                return f"{len(control.ListNodes(ListNodesRequest()).nodes_info)} nodes"
        except CarrierError as error:
            return str(error)


def bare(made: Federation) -> str:
    """What a call without TLS is told."""
    port = made.wires["east"].target
    found = httpx.post(f"http://localhost:{port}/v1/fleet/activate", timeout=LONG, trust_env=False)
    return f"{found.status_code} {found.text}"


def slices(adapter: Path, but: Path) -> list[bytes]:
    """Bytes from the middle of each leaf of an adapter, where it differs from another."""
    mine, others = load_file(adapter / ADAPTER), load_file(but / ADAPTER)
    found = []
    for name, leaf in mine.items():
        raw = leaf.numpy().tobytes()
        at = len(raw) // 2 // SLICE * SLICE
        if raw[at : at + SLICE] != others[name].numpy().tobytes()[at : at + SLICE]:
            found.append(raw[at : at + SLICE])
    assert len(found) == len(mine)
    return found


def holds(folder: Path, wanted: list[bytes]) -> list[Path]:
    """Files that hold any of these."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(each in path.read_bytes() for each in wanted)]


def test_the_global_adapter_is_the_simulations_bit_for_bit(done: Done) -> None:
    mine, theirs = (at / "adapters" / "global" / ADAPTER for at in (done.made.run, done.simulation))
    assert mine.read_bytes() == theirs.read_bytes()


def test_each_sites_own_adapter_is_the_simulations_bit_for_bit(done: Done) -> None:
    for name in NAMES:
        theirs = done.simulation / "adapters" / "clients" / name
        mine = personal(done.made.kit(name))
        assert (mine / ADAPTER).read_bytes() == (theirs / ADAPTER).read_bytes()
        assert (mine / "adapter_config.json").is_file()


@pytest.mark.parametrize("log", ["rounds", "personal", "evaluation"])
def test_the_records_are_the_simulations_but_for_the_time(done: Done, log: str) -> None:
    def told(run: Path) -> list[records.Line]:
        lines = records.lines(run / f"{log}.jsonl")
        plain = [{k: v for k, v in x.items() if "seconds" not in k} for x in lines]
        return sorted(plain, key=lambda x: (x.get("round", 0), x.get("client", ""), str(x)))

    assert told(done.made.run) == told(done.simulation) != []


def test_no_file_of_the_servers_holds_any_of_a_sites_own_adapter(done: Done) -> None:
    # The same search finds the global adapter there, and a site's own at the site.
    shared = done.made.run / "adapters" / "global"
    for name in NAMES:
        kit, own = done.made.kit(name), slices(personal(done.made.kit(name)), shared)
        assert personal(kit) / ADAPTER in holds(kit, own)
        assert holds(done.made.server, own) == []
        assert shared / ADAPTER in holds(done.made.server, slices(shared, personal(kit)))
    assert (done.made.server / "flower" / "superlink.db").stat().st_size > 0


def test_a_page_and_the_test_are_there_at_the_end(done: Done) -> None:
    assert "<html" in (done.made.run / "report.html").read_text("utf-8")
    assert f"report    {done.made.run / 'report.html'}" in done.printed
    rows = records.lines(done.made.run / "evaluation.jsonl")
    models = ("backbone", "global", "personal")
    assert sorted((r["client"], r["model"]) for r in rows) == [
        (name, model) for name in NAMES for model in models
    ]


def test_status_tells_of_a_run_while_it_waits_and_when_it_is_over(done: Done) -> None:
    after = said("status", done.made.server)
    assert "round 0 of 3, running" in done.during
    assert "round 3 of 3, finished" in after
    assert "9 updates accepted, 0 refused" in after
    for name in NAMES:
        assert name in after


def test_each_stranger_is_told_why_and_what_to_do(done: Done) -> None:
    turned = done.turned
    assert "have its operator register west's key.pub" in turned["unregistered"]
    assert "fetch a new kit from its operator" in turned["another CA"]
    assert turned["no TLS"].startswith("400 fedgen: this port speaks TLS")
    assert "403" in turned["control"]
    assert "only a site's own calls are served here" in turned["control"]
    for stranger in ("unregistered", "another CA", "plaintext"):
        assert "connected to" not in turned[stranger]
        assert "joined" not in turned[stranger]


def test_nobody_but_the_three_sites_was_ever_in_the_run(done: Done) -> None:
    assert {line["site"] for line in done.made.audit("joined")} == {*NAMES}
    assert {line["site"] for line in done.made.audit("accepted")} == {*NAMES}
