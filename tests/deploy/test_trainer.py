"""The resident process answers as the site does, dies as processes do, and its light side copes."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from fedgen_edge.deploy.processes import Supervisor
from fedgen_edge.deploy.site.site import open_site
from fedgen_edge.deploy.site.trainer import (
    KEY,
    SOCKET,
    TrainerClient,
    make_key,
    shorten_socket_path,
)
from fedgen_edge.network.messages import (
    Answer,
    Terms,
    WorkRequest,
    decode_message,
    digest,
    encode_line,
)
from support.sites import RUN, ask, kit, work

BOUND = 120.0
LINE = encode_line(WorkRequest("train", Terms(RUN, "r", "b"), 0, 2, 1, None))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    make_key(folder)
    return folder


@contextmanager
def attended(state: Path, handle: str, before: str = "") -> Iterator[Supervisor]:
    """A process that attends with the handler of these lines, started again when it dies."""
    script = (
        f"{before}import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from fedgen_edge.deploy.site.trainer import serve_requests\n"
        f"state = Path({str(state)!r})\n"
        f"def handle(text, payload):\n{handle}"
        "serve_requests(state, handle)\n"
    )
    kept = Supervisor([sys.executable, "-c", script], state / "log", first_delay=0.05)
    kept.start()
    try:
        yield kept
    finally:
        kept.stop()


def forward(state: Path, **more: float) -> TrainerClient:
    return TrainerClient(
        state,
        threading.Event(),
        start_seconds=more.get("up", BOUND),
        work_seconds=more.get("done", BOUND),
    )


ECHO = "    return text[::-1], payload[::-1]\n"


def test_a_line_and_a_payload_go_there_and_back(state: Path) -> None:
    with attended(state, ECHO):
        asks = forward(state)
        assert asks("abc", b"") == ("cba", b"")
        large = os.urandom(3_000_000)
        assert asks("é\n", large) == ("\né", large[::-1])
        assert stat.S_IMODE((state / SOCKET).stat().st_mode) == 0o600
        assert stat.S_IMODE((state / KEY).stat().st_mode) == 0o600


def test_a_kit_may_lie_deeper_than_a_sockets_name_is_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    make_key(deep)
    assert len(str(deep / SOCKET)) > 108
    with attended(deep, ECHO):
        assert forward(deep)("abc", b"xy") == ("cba", b"yx")
    with shorten_socket_path(deep / SOCKET) as short:
        folder = Path(short).parents[1]
    assert not folder.exists()


def test_who_has_another_key_is_not_answered(state: Path) -> None:
    with attended(state, ECHO):
        asks = forward(state)
        assert asks.wait_until_ready()
        with shorten_socket_path(state / SOCKET) as name, pytest.raises(AuthenticationError):
            Client(name, "AF_UNIX", authkey=b"another")
        assert asks("abc", b"") == ("cba", b"")  # and others are, after it


def test_who_hangs_up_does_not_stop_the_trainer(state: Path) -> None:
    with attended(state, ECHO):
        asks, key = forward(state), (state / KEY).read_bytes()
        assert asks.wait_until_ready()
        for said in ([], [b"abc"], [b"abc", b"payload"]):
            with shorten_socket_path(state / SOCKET) as name, Client(name, authkey=key) as rude:
                for part in said:
                    rude.send_bytes(part)
        assert asks("abc", b"") == ("cba", b"")


def test_a_trainer_that_dies_at_its_work_is_said_to_once_it_is_back(state: Path) -> None:
    dies = (
        "    if not (state / 'died').exists():\n"
        "        (state / 'died').touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n" + ECHO
    )
    with attended(state, dies):
        asks = forward(state)
        answer = decode_message(Answer, *asks(LINE, b"payload"))
        assert (answer.refused, answer.kind, answer.round, answer.attempt) == (
            "trainer-died",
            "train",
            2,
            1,
        )
        assert answer.terms == Terms(RUN, "r", "b")
        assert answer.base == digest(b"payload")
        assert asks("abc", b"") == ("cba", b"")


def test_every_wait_ends(state: Path) -> None:
    absent = forward(state, up=0.2)
    assert decode_message(Answer, *absent(LINE, b"")).refused == "trainer-not-up"
    assert not absent.wait_until_ready()
    with attended(state, "    time.sleep(600)\n") as kept:
        killed: list[bool] = []

        def late() -> None:
            killed.append(True)
            kept.kill()

        asks = TrainerClient(state, threading.Event(), late, BOUND, 0.3)
        assert decode_message(Answer, *asks(LINE, b"")).refused == "trainer-late"
        assert killed
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        TrainerClient(state, stop, late, BOUND, BOUND)(LINE, b"")
        assert stop.is_set()
        assert len(killed) == 1


def test_a_line_that_is_no_work_is_refused_though_no_trainer_is_there(state: Path) -> None:
    assert decode_message(Answer, *forward(state, up=0.1)("nonsense", b"")).refused == "malformed"


def test_the_light_side_imports_nothing_heavy() -> None:
    script = (
        "import sys, fedgen_edge.deploy.site.trainer\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert told.stdout == b"[]\n"


def test_nothing_is_ever_pickled(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.connection._ForkingPickler", None)  # it would raise
    without = "import multiprocessing.connection as c\nc._ForkingPickler = None\n"
    with attended(state, ECHO, without):
        assert forward(state)("abc", b".\x95\x04\x80") == ("cba", b"\x80\x04\x95.")


def resident(folder: Path, ends: list[object]) -> Supervisor:
    command = [sys.executable, "-m", "fedgen_edge.deploy.site.trainer", str(folder)]
    told: Callable[..., bool] = lambda ended: ends.append(ended) is None and ended.code < 0  # noqa: E731
    return Supervisor(command, folder / "state" / "trainer.log", told, first_delay=0.05)


def test_killed_and_started_again_the_trainer_answers_as_the_site(tmp_path: Path) -> None:
    folder, ends = kit(tmp_path / "east", "east"), []
    site = open_site(kit(tmp_path / "other", "east"))
    assert ask(site, work(site, "join")).refused is None
    (folder / "state").mkdir()
    make_key(folder / "state")
    kept, asks = resident(folder, ends), forward(folder / "state")
    kept.start()
    try:
        joins, trains = work(site, "join"), work(site, "train", site.start)
        assert decode_message(Answer, *asks(encode_line(joins), b"")).refused is None
        timer = threading.Timer(0.05, kept.kill)
        timer.start()
        first = decode_message(Answer, *asks(encode_line(trains), trains.payload))
        timer.join()
        assert first.refused in {None, "trainer-died"}  # it may have been quicker than the kill
        while (again := decode_message(Answer, *asks(encode_line(trains), trains.payload))).refused:
            assert (again.refused, len(ends)) == ("trainer-died", 0)  # nor is the kill at once
        expected = ask(site, trains)
        assert (again.payload, again.said) == (expected.payload, expected.said)
    finally:
        kept.stop()
    assert len(ends) == 1


def test_what_the_user_is_to_mend_is_one_line_and_exits_with_2(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    (folder / "texts.jsonl").write_text("no json\n")
    (folder / "state").mkdir()
    make_key(folder / "state")
    command = [sys.executable, "-m", "fedgen_edge.deploy.site.trainer", str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    assert told.returncode == 2
    assert told.stdout == ""
    assert told.stderr.startswith("fedgen: data.path=")
    assert "line 1 is not JSON" in told.stderr
    assert told.stderr.count("\n") == 1


def test_a_terminated_trainer_ends_well_and_one_state_has_one_trainer(tmp_path: Path) -> None:
    folder = kit(tmp_path / "east", "east")
    (folder / "state").mkdir()
    make_key(folder / "state")
    command = [sys.executable, "-m", "fedgen_edge.deploy.site.trainer", str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        assert forward(folder / "state").wait_until_ready()
        second = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
        assert second.returncode == 2
        assert "in use by another process" in second.stderr
        first.send_signal(signal.SIGTERM)
        assert first.wait(BOUND) == 0
        assert not (folder / "state" / SOCKET).exists()
    finally:
        first.kill()
        first.wait()
