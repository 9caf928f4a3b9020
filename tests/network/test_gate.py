"""Every message that is not what was agreed is refused by its code; honest ones pass unchanged."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_gate_shortened import ATTACKS as SHORTENED

from contracts.test_contracts import make, shards
from fedgen_edge import engines
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.config import Method, Training
from fedgen_edge.data.batches import Budget
from fedgen_edge.errors import RefusedError
from fedgen_edge.federation.client import Recipe, make_optimizer_factory
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.leaves import scale
from fedgen_edge.network.bounds import Bounds
from fedgen_edge.network.gate import (
    CODES,
    Gate,
    OpenRound,
    read_answer,
    validate_numbers,
    validate_update,
    validate_weight,
)
from fedgen_edge.network.messages import MAX_LINE_BYTES, Reply, digest
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TASKS
from fedgen_edge.types import Order
from support.attacks import (
    ATTACKS,
    DATA,
    DELTA,
    HEADER,
    OPEN,
    PAYLOAD,
    SCHEMA,
    START,
    lined,
    odd,
    reply,
    said,
)

OTHERS = {
    "duplicate",
    "spectrum-too-large",
    "bad-cluster",
    *(code for code, _, _ in SHORTENED.values()),
}
"""Codes that other tests meet."""
PLAIN = r"[ -~]{1,400}"
"""Fit for a terminal: one short line, nothing but plain characters."""


@pytest.mark.parametrize(("code", "sent"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused_with_its_code(code: str, sent: Reply) -> None:
    with pytest.raises(RefusedError) as refusal:
        validate_update(OPEN, sent)
    assert refusal.value.code == code
    assert re.fullmatch(PLAIN, str(refusal.value))


def test_the_honest_message_that_they_were_made_of_is_accepted() -> None:
    found = validate_update(OPEN, reply())
    assert all(torch.equal(found.leaves[k], DELTA[k]) for k in SCHEMA)
    assert (found.weight, found.loss, found.steps) == (9, 1.5, 3)
    assert found.sha256 == digest(PAYLOAD)


def test_a_site_may_say_that_it_has_lost_what_it_kept() -> None:
    assert validate_update(OPEN, said(lost=True)).lost_memory
    assert not validate_update(OPEN, reply()).lost_memory


def test_a_spectrum_is_refused_only_where_there_is_a_limit() -> None:
    a, b = START["m.lora_A"].double(), START["m.lora_B"].double()
    dense = (b + DELTA["m.lora_B"]) @ (a + DELTA["m.lora_A"]) - b @ a
    own = float(torch.linalg.svdvals(dense).max())
    for limit, allowed in ((own * 1.01, True), (own * 0.99, False)):
        limited = replace(OPEN, bounds=replace(OPEN.bounds, spectrum=limit))
        if allowed:
            assert validate_update(limited, reply()).weight == 9
        else:
            with pytest.raises(RefusedError, match=r"^spectrum-too-large: .*federation\.toml"):
                validate_update(limited, reply())


def test_without_a_bound_a_boosted_message_passes_unless_its_squares_would_be_infinite() -> None:
    loose = replace(OPEN, bounds=Bounds(1000))
    assert validate_update(loose, reply(encode(scale(DELTA, 1e10)))).weight == 9
    with pytest.raises(RefusedError, match=r"^change-too-large: "):
        validate_update(loose, reply(encode(scale(DELTA, 1e30))))


def test_the_same_bytes_again_count_once_and_other_bytes_are_refused() -> None:
    gate = Gate(OPEN)
    assert gate.accept(reply()) is not None
    assert gate.accept(reply()) is None
    half = reply(encode(scale(DELTA, 0.5)))
    for other in (said(loss=1.25), half, reply(b""), lined("1.5", "\ud800")):
        with pytest.raises(RefusedError, match=r"^duplicate: "):
            gate.accept(other)
    assert gate.accept(reply()) is None
    assert Gate(OPEN).accept(reply()) is not None


def test_a_refused_message_does_not_count_and_each_site_has_its_own() -> None:
    gate = Gate(replace(OPEN, weights={"site": 9, "other": 9}))
    with pytest.raises(RefusedError, match=r"^not-finite: "):
        gate.accept(odd(math.nan))
    assert gate.accept(reply()) is not None
    assert gate.accept(replace(said(loss=2.0), site="other")) is not None


def test_an_earlier_rounds_message_is_refused_in_the_next() -> None:
    earlier = replace(OPEN, expected=replace(OPEN.expected, round=6, base="a" * 64))
    old = reply(round=6, base="a" * 64)
    assert Gate(earlier).accept(old) is not None
    with pytest.raises(RefusedError, match=r"^stale-round: "):
        Gate(OPEN).accept(old)


def test_every_code_is_told_in_one_sentence_and_met_in_a_test() -> None:
    sources = [p.read_text("utf-8") for p in Path(engines.__path__[0]).glob("*.py")]
    used = {c for text in sources for c in re.findall(r'RefusedError\(\s*"([a-z-]+)"', text)}
    assert used <= CODES.keys()
    assert {code for code, _ in ATTACKS.values()} | OTHERS == {*CODES}
    assert all(re.fullmatch(r"[A-Z][^.\n]*\.", sentence) for sentence in CODES.values())


def test_what_the_library_alone_refuses_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(payload: bytes) -> None:
        raise SafetensorError

    monkeypatch.setattr("fedgen_edge.network.payload.decode", strict)
    with pytest.raises(RefusedError, match=r"^bad-header: "):
        validate_update(OPEN, reply())


def test_an_adapter_of_very_many_leaves_may_have_a_long_header() -> None:
    many = {f"layer.{i:04d}.bias": torch.full((2,), 0.01) for i in range(1500)}
    schema = dict.fromkeys(many, (2,))
    payload = encode(many)
    assert int.from_bytes(payload[:8], "little") > MAX_LINE_BYTES
    wide = replace(OPEN, schema=schema, start=scale(many, 0.0))
    assert validate_update(wide, reply(payload)).leaves.keys() == many.keys()


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1)


def flipped(content: bytes, at: list[tuple[float, int]]) -> bytes:
    changed = bytearray(content)
    for place, bits in at:
        changed[int(place * len(changed))] ^= bits
    return bytes(changed)


def outcome(sent: Reply) -> None:
    """Refused with a code that is known, or harmless."""
    found, refusal = None, None
    try:
        found = validate_update(OPEN, sent)
    except RefusedError as error:
        refusal = error
    if found is None:
        assert refusal is not None
        assert refusal.code in CODES
        assert re.fullmatch(PLAIN, str(refusal))
        return
    assert {k: tuple(v.shape) for k, v in found.leaves.items()} == SCHEMA
    assert all(bool(v.isfinite().all()) for v in found.leaves.values())
    # three steps' bound, which is 0.0301
    assert all(float(v.abs().max()) < 0.0302 for v in found.leaves.values())
    assert found.weight == 9


patient = settings(deadline=None, max_examples=300)


@patient
@given(at=flips)
def test_flipped_bytes_of_a_payload_are_refused_or_harmless(at: list[tuple[float, int]]) -> None:
    outcome(reply(flipped(PAYLOAD, at)))


@patient
@given(at=flips)
def test_flipped_bytes_of_a_header_are_refused_or_harmless(at: list[tuple[float, int]]) -> None:
    outcome(reply(flipped(PAYLOAD[: 8 + len(HEADER)], at) + DATA))


@patient
@given(at=flips)
def test_flipped_bytes_of_a_line_are_refused_or_harmless(at: list[tuple[float, int]]) -> None:
    text = flipped(reply().line.encode(), at).decode("utf-8", "surrogateescape")
    outcome(replace(reply(), line=text))


@patient
@given(text=st.text(), payload=st.binary())
def test_any_text_and_bytes_are_refused(text: str, payload: bytes) -> None:
    with pytest.raises(RefusedError):
        validate_update(OPEN, Reply("site", text, payload))
    outcome(reply(payload))


TRAINING = Training(batch=2, epochs=2)


@pytest.mark.parametrize("learnt", TASKS)
@pytest.mark.parametrize("name", ["fedgen-edge", "fedper", "rolora", "fedavg-full", "local-only"])
def test_what_an_honest_client_sends_is_accepted_bit_by_bit(learnt: str, name: str) -> None:
    algorithm = METHODS[name].make(Method())
    task = make(learnt, full=algorithm.adapts == "full")
    recipe = Recipe(
        make_optimizer_factory(TRAINING, 1e-3), TRAINING.clip, corrects=algorithm.corrects
    )
    clients = Clients(task, algorithm, shards(task), 0)
    start = algorithm.init(task.init(generator(0, "init"))).adapter
    job = Train(clients, Budget(TRAINING.batch, TRAINING.epochs), lambda _: recipe)
    (sent,) = job.send([Order((0,), 7, start)], stacked=False)
    shared = algorithm.sends(list(start), 7)
    weight = len(next(iter(clients.shards[0].train.values())))
    open_ = OpenRound(
        OPEN.expected,
        {k: tuple(start[k].shape) for k in shared},
        start,
        Bounds(1000, TRAINING, 1e-3, tuple(task.phases)),
        {"site": weight},
    )
    spoken = {"weight": sent.weight, "loss": sent.loss, "steps": sent.steps}
    found = validate_update(open_, reply(sent.payload, spoken))
    expected = decode(sent.payload)
    assert found.leaves.keys() == expected.keys() == shared
    assert all(torch.equal(found.leaves[k], expected[k]) for k in shared)
    assert (found.weight, found.steps) == (weight, 2 * -(-weight // 2))
    assert any(leaf.any() for leaf in found.leaves.values()) == bool(shared)


def test_work_without_a_payload_is_answered_without_one() -> None:
    asked = replace(OPEN.expected, kind="evaluate")
    sums = {"total": 12.5, "count": 8, "words": 3}
    answer = read_answer(asked, reply(b"", sums, kind="evaluate"))
    assert validate_numbers(answer.said, ("total",), ("count", "words")) == sums
    with pytest.raises(RefusedError, match=r"^payload-too-long: "):
        read_answer(asked, reply(b"x", sums, kind="evaluate"))


@pytest.mark.parametrize(
    "told",
    [
        {"total": 1.0},
        {"total": 1.0, "count": 1, "more": 1},
        {"total": 1.0, "x\n" * 99: 1},
        {"total": math.nan, "count": 1},
        {"total": 1.0, "count": -1},
        {"total": 1.0, "count": math.inf},
        {"total": True, "count": 1},
        {"total": [1.0], "count": 1},
        {"total": 10**400, "count": 1},
        {f"{i}": 1.0 for i in range(10_000)},
    ],
)
def test_sums_that_were_not_asked_for_or_are_no_numbers_are_refused(told: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"^bad-numbers: [ -~]{1,200}$"):
        validate_numbers(told, ("total",))


def test_sums_may_be_negative_and_counts_zero() -> None:
    assert validate_numbers({"total": -1, "count": 0}, ("total",)) == {"total": -1.0, "count": 0.0}


def test_a_weight_is_a_whole_number_however_it_is_written() -> None:
    assert [validate_weight(value, 10) for value in (1, 9.0, 10)] == [1, 9, 10]
    assert type(validate_weight(9.0, 10)) is int
