"""Sites as an engine: what is refused leaves the model as silence would, to the bit."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedgen_edge.adapters.ranks import mask_rank, truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.config import Federation
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.errors import QuorumError
from fedgen_edge.federation.rounds import rounds
from fedgen_edge.leaves import scale
from fedgen_edge.network.messages import Carrier, Reply, WorkRequest, digest
from fedgen_edge.network.remote import Remote, RemoteTraining
from fedgen_edge.types import Leaves, Order
from support.attacks import ATTACKS, OPEN, PAYLOAD, START, TERMS, reply

NAMES = ("one", "site", "two")
PLAIN = Algorithm()
STATE = PLAIN.init(START)
SENT = encode(STATE.adapter)


@dataclass
class Scripted:
    """Brings what it was given, whoever is asked; and remembers that it was told to stop."""

    replies: list[Reply]
    work: list[Mapping[str, WorkRequest]] = field(default_factory=list)
    given_up: list[Reply] = field(default_factory=list)

    def present(self) -> list[str]:
        return [*NAMES]

    def exchange(self, work: Mapping[str, WorkRequest], seconds: float) -> Generator[Reply]:
        assert seconds == 60
        self.work.append(work)
        left = list(self.replies)
        try:
            while left:
                yield left.pop(0)
        finally:
            self.given_up = left


@dataclass
class Heard:
    lines: list[dict[str, str | int]] = field(default_factory=list)
    whys: list[str] = field(default_factory=list)

    def __call__(self, event: str, *, why: str = "", **fields: str | int) -> None:
        self.lines.append({"event": event, **fields})
        self.whys += [why] if why else []


def based(one: Reply) -> Reply:
    """The same, as an answer to what is sent here."""
    return replace(one, line=one.line.replace("b" * 64, digest(SENT)))


def honest(name: str, size: float) -> Reply:
    return based(replace(reply(encode(scale(decode(PAYLOAD), size))), site=name))


def ended(
    replies: list[Reply], wanted: int = 3, quorum: int = 1, algorithm: Algorithm = PLAIN
) -> tuple[Leaves, Heard, Scripted]:
    """The adapter after the eighth round."""
    heard, carrier = Heard(), Scripted(replies)
    job = RemoteTraining(
        algorithm,
        TERMS,
        lambda: NAMES,
        lambda: dict.fromkeys(NAMES, 9),
        lambda _: OPEN.bounds,
        lambda _: 1,
        lambda _: {"two": "d" * 64},
        heard,
    )
    plan, start = Federation(clients=3, rounds=8), replace(STATE, round=7)
    engine = Remote(carrier, wanted, quorum, 60.0)
    (commit,) = rounds(start, algorithm, engine, job, plan)
    return commit.state.adapter, heard, carrier


def same(one: Leaves, other: Leaves) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


OTHERS = [honest("one", 0.5), honest("two", 0.25)]
SILENCE = ended(OTHERS)[0]


@pytest.mark.parametrize(("code", "sent"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_leaves_the_model_as_silence_would(code: str, sent: Reply) -> None:
    one, two = OTHERS
    adapter, heard, _ = ended([one, based(sent), two])
    assert same(adapter, SILENCE)
    event = "declined" if code == "declined" else "refused"
    told = [line for line in heard.lines if line["event"] == event]
    assert told == [
        {
            "event": event,
            "site": sent.site,
            "code": code,
            "payload": digest(sent.payload),
            "round": 7,
            "attempt": 1,
        }
    ]


def test_the_honest_message_that_they_were_made_of_changes_the_model() -> None:
    one, two = OTHERS
    adapter, heard, _ = ended([one, based(reply()), two])
    assert not same(adapter, SILENCE)
    each = {k: v / 3 * (1 + 0.5 + 0.25) for k, v in decode(PAYLOAD).items()}
    for name, change in each.items():
        torch.testing.assert_close(adapter[name], START[name] + change)
    assert [line["event"] for line in heard.lines] == ["opened", *["accepted"] * 3]


def test_the_order_in_which_answers_come_is_nothing() -> None:
    three = [*OTHERS, based(reply())]
    assert same(ended(three)[0], ended(three[::-1])[0])


def test_a_better_message_may_follow_one_that_was_refused() -> None:
    wrong = based(replace(reply(PAYLOAD[:-1])))
    adapter, heard, _ = ended([wrong, based(reply()), *OTHERS])
    assert same(adapter, ended([based(reply()), *OTHERS])[0])
    assert [line["event"] for line in heard.lines][1:3] == ["refused", "accepted"]


def test_the_same_message_again_is_passed_over_and_another_is_refused() -> None:
    right, other = based(reply()), based(replace(reply(encode(scale(decode(PAYLOAD), 0.9)))))
    adapter, heard, _ = ended([right, right, other, *OTHERS])
    assert same(adapter, ended([right, *OTHERS])[0])
    told = [(line["event"], line.get("code")) for line in heard.lines[1:]]
    assert told == [
        ("accepted", None),
        ("refused", "duplicate"),
        ("accepted", None),
        ("accepted", None),
    ]


def test_nobody_is_waited_for_once_enough_have_answered() -> None:
    adapter, heard, carrier = ended([*OTHERS, based(reply())], wanted=2)
    assert same(adapter, SILENCE)
    assert [one.site for one in carrier.given_up] == ["site"]
    assert len([line for line in heard.lines if line["event"] == "accepted"]) == 2


def test_fewer_than_the_quorum_change_nothing() -> None:
    before = {k: v.clone() for k, v in START.items()}
    with pytest.raises(QuorumError, match=r"round 8 had 2 of the 3 updates .* 3 sites asked"):
        ended(OTHERS, quorum=3)
    assert same(START, before)


def test_a_site_of_a_lower_rank_answers_what_it_was_sent_and_no_other_rank() -> None:
    # `one` and `two` hold one of the two terms of `m`, and `site` both
    algorithm, few = Algorithm(ranks=(1, 2)), encode(truncate_rank(STATE.adapter, 1))
    sent = {"one": few, "site": SENT, "two": few}
    delta = decode(PAYLOAD)

    def answer(name: str, base: str, rank: int) -> Reply:
        own = reply(encode(truncate_rank(delta, rank)), base=digest(sent[base]))
        return replace(own, site=name)

    right = [answer("one", "one", 1), answer("site", "site", 2)]
    adapter, heard, carrier = ended(right, algorithm=algorithm)
    assert {name: work.payload for name, work in carrier.work[0].items()} == sent
    assert [line["event"] for line in heard.lines] == ["opened", "accepted", "accepted"]
    for name, value in delta.items():
        # a plain mean counts zero for what `one` lacks
        expected = START[name] + (mask_rank(delta, 1)[name] + value) / 2
        torch.testing.assert_close(adapter[name], expected)
    for wrong, code in (
        (answer("two", "site", 2), "payload-too-long"),
        (answer("two", "site", 1), "wrong-base"),
        (answer("site", "one", 1), "wrong-base"),
        (answer("site", "site", 1), "wrong-shape"),
    ):
        _, heard, _ = ended([wrong, right[0]], algorithm=algorithm)
        assert [line.get("code") for line in heard.lines] == [None, code, None]


def test_what_a_carrier_says_has_failed_is_written_down_and_is_no_refusal() -> None:
    adapter, heard, _ = ended([Reply("site", "", b"", failed="away"), *OTHERS])
    assert same(adapter, SILENCE)
    assert heard.lines[1] == {"event": "failed", "site": "site", "round": 7, "attempt": 1}
    assert heard.whys == ["away"]


def test_work_says_all_that_an_answer_depends_on() -> None:
    _, heard, carrier = ended(OTHERS)
    assert heard.lines[0] == {"event": "opened", "round": 7, "attempt": 1}
    (work,) = carrier.work
    assert work == {
        name: WorkRequest("train", TERMS, number, 7, 1, "d" * 64 if name == "two" else None, SENT)
        for number, name in enumerate(NAMES)
    }


def test_another_job_is_not_sites_and_sites_are_not_another_engines() -> None:
    order = Order((0,), 7, START)
    job = RemoteTraining(
        Algorithm(), TERMS, lambda: NAMES, dict, lambda _: OPEN.bounds, lambda _: 0,
        lambda _: {}, Heard(),
    )  # fmt: skip
    with pytest.raises(NotImplementedError):
        list(run_serially([order], job))
    assert job.steps(order) == 0
    assert isinstance(Scripted([]), Carrier)
