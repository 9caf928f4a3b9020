"""What a site makes of one message; the rest of it is tested with Flower's servers."""

import time

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgen_edge.network.flower.carrier import unwrap, wrap
from fedgen_edge.network.flower.site import _make_answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Message:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    message = Message(wrap("work", b"abc"), 7, "query.train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "a" * 64
    return message


def test_a_handler_s_answer_is_the_reply_to_its_message(asked: Message) -> None:
    reply = _make_answer(asked, asked.content, lambda said, payload: (said + "!", payload * 2))
    assert unwrap(reply.content) == ("work!", b"abcabc")
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == ("a" * 64, 7)
    assert 0 < reply.metadata.ttl <= 60


def test_a_message_whose_time_is_past_is_not_handled(asked: Message) -> None:
    asked.metadata.__dict__["_created_at"] = time.time() - 61
    handled = []
    reply = _make_answer(asked, asked.content, lambda *message: handled.append(message) or message)
    assert not handled
    assert reply.error.reason == "its time was past: do the clocks agree?"


def test_a_hostile_message_is_an_error_and_not_handled(asked: Message) -> None:
    handled = []
    reply = _make_answer(asked, RecordDict(), lambda *message: handled.append(message) or message)
    assert not handled
    assert reply.error.reason == "RefusedError"


def test_of_an_error_nothing_but_its_name_leaves_the_site(
    asked: Message, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(said: str, payload: bytes) -> tuple[str, bytes]:
        raise KeyError("a patient's name")

    reply = _make_answer(asked, asked.content, breaks)
    assert (reply.error.code, reply.error.reason) == (2, "KeyError")
    assert "a patient's name" in caplog.text
