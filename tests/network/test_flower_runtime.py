"""Flower as it really runs: its servers as processes, with TLS and keys, and our ends of them."""

import contextlib
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.runtime import RuntimeHttpClient

from fedgen_edge.errors import CarrierError, ConfigError, MissingExtraError
from fedgen_edge.network.flower import http as flower_client
from fedgen_edge.network.flower.runtime import Hub, hub, serve, superlink, supernode
from fedgen_edge.network.flower.server import read_public_key
from fedgen_edge.network.flower.version import FLOWER, check_version
from fedgen_edge.network.messages import Reply, encode_line
from support.flower_network import LONG, Network, certificates, free_port, private, until

SUPERLINK = 1
"""Its number among nodes."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("flower"))
    certificates(made.folder)
    made.secret.write_bytes(secrets.token_bytes(32))
    made.hold.set()
    hurried = pytest.MonkeyPatch()
    hurried.setattr(flower_client, "HEARTBEAT_SECONDS", 1.0)
    try:
        made.begin()
        for name in ("north", "south", "west"):
            private(made.folder / name)
            made.keys[name] = made.folder / f"{name}.pub"
        with made.hub():  # which registers their keys
            for name in made.keys:
                made.site(name)
        yield made
    finally:
        hurried.undo()
        made.stop.set()
        made.hold.set()
        for name in list(made.started):
            made.kill(name)
        for thread in made.threads:
            thread.join(LONG)


def answers(replies: Iterator[Reply]) -> dict[str, tuple[str, bytes, str | None]]:
    found = list(replies)
    assert len({r.site for r in found}) == len(found)
    return {r.site: (r.line, r.payload, r.failed) for r in found}


@pytest.fixture
def opened(network: Network) -> Iterator[Hub]:
    with network.hub() as made:
        until(lambda: set(network.keys) <= set(made.carrier.present()))
        network.heard.clear()
        yield made


@contextlib.contextmanager
def held(network: Network, quick: str = "") -> Iterator[None]:
    """No handler ends while the block runs, but for a quick site's."""
    network.quick = quick
    network.hold.clear()
    try:
        yield
    finally:
        network.hold.set()
        network.quick = ""


def test_another_flower_or_none_is_one_line_that_says_what_to_install() -> None:
    check_version(FLOWER)
    with pytest.raises(CarrierError, match=r'^flwr 1\.42\.0 .*: pip install "flwr==1\.41\.0"$'):
        check_version("1.42.0")
    with pytest.raises(MissingExtraError, match=r'pip install .*"flwr==1\.41\.0"'):
        check_version(None)


def test_a_site_loads_no_model_library_to_serve() -> None:
    program = (
        "import sys; from fedgen_edge.network.flower.runtime import serve; "
        "print(sorted({'torch', 'transformers', 'diffusers', 'ray'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=LONG, check=True
    )
    assert said.stdout == b"[]\n"


def test_each_site_answers_with_its_own_name_and_equal_payloads_go_up_once(
    network: Network, opened: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed, push = [], RuntimeHttpClient.PushObject

    def counted(client: RuntimeHttpClient, request: PushObjectRequest) -> PushObjectResponse:
        if request.node.node_id == SUPERLINK:
            pushed.append(len(request.object_content))
        return push(client, request)

    monkeypatch.setattr(RuntimeHttpClient, "PushObject", counted)
    assert opened.carrier.present() == ["north", "south", "west"]
    payload = secrets.token_bytes(2_000_000)
    work = network.everyone(payload)
    assert answers(opened.carrier.exchange(work, LONG)) == {
        site: (encode_line(each), payload, None) for site, each in work.items()
    }
    assert sorted(network.heard) == [
        (site, encode_line(work[site]), payload) for site in sorted(work)
    ]
    # Each site's message, its records and its line; and once the array, its record and its chunk.
    assert len(pushed) == 3 * 3 + 3
    assert len(payload) < sum(pushed) < len(payload) + 20_000


def test_of_a_handler_s_error_the_server_learns_its_name_alone(
    network: Network, opened: Hub
) -> None:
    found = answers(opened.carrier.exchange(network.everyone(b"fail at west"), LONG))
    assert found.pop("west") == ("", b"", "ValueError (Flower's error 2)")
    assert [failed for _, _, failed in found.values()] == [None, None]


def test_a_second_hub_ends_the_run_of_the_first_whose_next_call_says_so(
    network: Network, opened: Hub
) -> None:
    with network.hub():
        runs = opened.registry.control.ListRuns(ListRunsRequest()).run_dict.values()
        assert [run.status.status for run in runs].count("running") == 1
    with pytest.raises(CarrierError, match=r"127\.0\.0\.1") as caught:
        list(opened.carrier.exchange(network.everyone(), LONG))
    assert "\n" not in str(caught.value)

    def lost() -> bool:
        with contextlib.suppress(CarrierError):
            opened.carrier.present()
            return False
        return True

    until(lost)


def test_a_new_hub_brings_nothing_of_the_one_before_it(network: Network) -> None:
    with held(network, quick="north"):
        with network.hub() as first:
            until(lambda: len(first.carrier.present()) == 3)
            network.heard.clear()
            replies = first.carrier.exchange(network.everyone(b"old"), LONG)
            assert next(replies).site == "north"
            until(lambda: len(network.heard) == 3)
            replies.close()  # pyright: ignore[reportAttributeAccessIssue]
        with network.hub() as second:
            replies = second.carrier.exchange(network.everyone(b"new"), LONG)
            assert next(replies).payload == b"new"
            network.hold.set()
            assert {(r.site, r.payload) for r in replies} == {("south", b"new"), ("west", b"new")}


def test_a_server_that_is_killed_and_started_again_loses_no_reply(
    network: Network, opened: Hub
) -> None:
    work, found = network.everyone(secrets.token_bytes(100_000)), []
    replies = opened.carrier.exchange(work, LONG)
    asking = threading.Thread(target=lambda: found.append(answers(replies)))
    with held(network):
        asking.start()
        until(lambda: len(network.heard) == 3)
        network.kill("superlink")
        network.begin()
    asking.join(2 * LONG)
    assert found == [{site: (encode_line(each), each.payload, None) for site, each in work.items()}]


def test_a_supernode_is_let_in_by_its_key_and_by_nothing_else(
    network: Network, opened: Hub
) -> None:
    network.node("stranger")
    assert network.started.pop("stranger").wait(LONG) != 0
    assert "Failed to activate SuperNode" in network.log("stranger")
    assert opened.carrier.present() == ["north", "south", "west"]

    pub = network.folder / "stranger.pub"
    opened.register("east", pub)
    network.node("stranger")
    until(lambda: opened.carrier.present() == ["east", "north", "south", "west"])

    opened.unregister("east")
    assert opened.carrier.present() == ["north", "south", "west"]
    network.started.pop("stranger").wait(LONG)
    with pytest.raises(ConfigError, match="taken back"):
        opened.register("east", pub)


def test_a_server_that_is_not_there_or_not_ours_is_one_line(
    network: Network, tmp_path: Path
) -> None:
    ca = network.folder / "ca.crt"
    nowhere = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(CarrierError, match=f"{nowhere} does not answer"),
        hub(nowhere, ca, network.secret, {}, patience=0.5),
    ):
        pass
    certificates(tmp_path)
    with (
        pytest.raises(CarrierError, match="CERTIFICATE_VERIFY_FAILED"),
        hub(network.address, tmp_path / "ca.crt", network.secret, {}, patience=3600.0),
    ):
        pass


def test_files_that_are_missing_or_no_keys_are_named(network: Network, tmp_path: Path) -> None:
    ca, missing = network.folder / "ca.crt", tmp_path / "missing"
    with pytest.raises(ConfigError, match="missing"), hub(network.address, ca, missing, {}):
        pass
    with pytest.raises(ConfigError, match="missing"):
        serve(network.address, missing, lambda *message: message, network.stop)
    with pytest.raises(ConfigError, match=r"ca\.crt is no public key"):
        read_public_key(ca)


def test_a_supernode_with_another_secret_is_told_of(network: Network, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(secrets.token_bytes(32))
    with pytest.raises(CarrierError, match="other"):
        serve(network.ports["north"], tmp_path / "other", lambda *message: message, network.stop)


def test_a_site_whose_supernode_dies_is_missed_and_the_others_are_not(
    network: Network, opened: Hub
) -> None:
    started = time.monotonic()
    with held(network):
        replies = opened.carrier.exchange(network.everyone(), 15.0)
        asking = threading.Thread(target=lambda: found.append(answers(replies)))
        found: list[dict[str, tuple[str, bytes, str | None]]] = []
        asking.start()
        until(lambda: len(network.heard) == 3)
        network.kill("west")
    asking.join(LONG)
    assert set(found[0]) == {"north", "south"}
    assert 15 <= time.monotonic() - started < LONG


def test_flowers_programs_are_found_where_no_path_leads_to_them(tmp_path: Path) -> None:
    # a service of systemd's has only the system's folders on its path
    here = tmp_path / "file"
    for command in (superlink(1, (here,) * 3, here, here), supernode("a:1", here, here, 1, here)):
        assert Path(command[0]).parent == Path(sys.executable).parent
        assert Path(command[0]).exists()
