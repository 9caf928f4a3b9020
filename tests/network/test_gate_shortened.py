"""The gate, where changes travel through a chain: what is not made by it is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.compression.chain import count_part_bytes
from fedgen_edge.compression.serialize import encode
from fedgen_edge.compression.wire import (
    Wire,
    decode_update,
    encode_update,
    get_max_bytes_up,
    make_wire,
)
from fedgen_edge.config import Compression, Training
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import norm, scale
from fedgen_edge.network.bounds import Bounds, compute_reach
from fedgen_edge.network.gate import OpenRound, validate_update
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves
from support.attacks import DELTA, OPEN, SCHEMA, reply

SHORT = {"sparsify": "top-k", "density": 0.1, "dtype": "int8", "block": 16}


def line(**up: object) -> Wire:
    return make_wire(Compression(**{**SHORT, **up}), Compression(), 0, {})  # pyright: ignore[reportArgumentType]


def opening(on: Wire) -> OpenRound:
    """The open round of a run whose changes travel so; the site is its third."""
    return replace(OPEN, wire=on, site_numbers={"site": 2})


def sent(on: Wire, delta: Leaves = DELTA) -> bytes:
    return encode_update(on, delta, {}, 7, 2)[0]


PLAIN, FRAMED, HALVES = line(), line(zstd=3), line(sparsify="all", dtype="int4")
HONEST = sent(PLAIN)
PARTS = count_part_bytes(PLAIN.up, SCHEMA)


def with_byte(payload: bytes, at: int, byte: int) -> bytes:
    return payload[:at] + bytes([byte]) + payload[at + 1 :]


# after the header come scales, of two bytes, then values and gaps, of one; the second byte of a
# scale has its sign, and 255 sixteen ones
CODES_AT = PARTS["header"] + PARTS["scales"]
FILLED = HONEST[:CODES_AT] + b"\xff" * (len(HONEST) - CODES_AT)
ATTACKS: dict[str, tuple[str, Wire, bytes]] = {
    "truncated": ("wrong-length", PLAIN, HONEST[:-1]),
    "empty": ("wrong-length", PLAIN, b""),
    "longer": ("payload-too-long", PLAIN, HONEST + b"\0"),
    "other header": ("bad-header", PLAIN, HONEST.replace(b"scales", b"shares")),
    "leaves by name": (
        "payload-too-long",
        PLAIN,
        sent(make_wire(Compression(), Compression(), 0, {})),
    ),
    "places beyond all": ("bad-positions", PLAIN, FILLED),
    "negative scale": ("bad-values", PLAIN, with_byte(HONEST, PARTS["header"] + 1, 0xB0)),
    "infinite scale": ("bad-values", PLAIN, with_byte(HONEST, PARTS["header"] + 1, 0x7C)),
    "no frame": ("bad-frame", FRAMED, b"x" * 40),
    "frame cut short": ("bad-frame", FRAMED, sent(FRAMED)[:-5]),
    "frame and more": ("bad-frame", FRAMED, sent(FRAMED) + b"x"),
    "code that none has": ("bad-values", HALVES, sent(HALVES)[:-1] + b"\x88"),
    "boosted": ("change-too-large", PLAIN, sent(PLAIN, scale(DELTA, 100.0))),
}  # fmt: skip


@pytest.mark.parametrize(("code", "on", "payload"), ATTACKS.values(), ids=ATTACKS)
def test_what_no_chain_makes_is_refused_with_its_code(code: str, on: Wire, payload: bytes) -> None:
    with pytest.raises(RefusedError) as refusal:
        validate_update(opening(on), reply(payload))
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("on", [PLAIN, FRAMED, HALVES, line(sparsify="random-k"), line(low_rank=1)])
def test_what_an_honest_site_makes_counts_as_in_a_simulation(on: Wire) -> None:
    payload = sent(on)
    found = validate_update(opening(on), reply(payload)).leaves
    expected = decode_update(on, payload, SCHEMA, 7, 2)
    assert all(torch.equal(found[k], expected[k]) for k in SCHEMA)
    assert len(payload) <= get_max_bytes_up(on, SCHEMA)


ADAMW, SGD = Training(batch=4), Training(optimizer="sgd", batch=4)
CHAINS = [
    {
        "sparsify": keep,
        "dtype": values,
        "density": 0.07,
        "block": 16,
        "zstd": zstd,
        "feedback": again,
    }
    for keep in ("all", "top-k", "random-k")
    for values in ("fp32", "fp16", "bf16", "int8", "int4")
    for zstd, again in ((0, False), (3, False), (0, True))
    if not (again and (keep, values) == ("all", "fp32"))
]


@given(
    st.sampled_from(CHAINS),
    st.sampled_from([ADAMW, SGD]),
    st.floats(-9, 0),
    st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_a_change_that_passes_plain_passes_through_every_chain(
    up: dict[str, Any], training: Training, power: float, seed: int
) -> None:
    # down to a rate of 1e-9, where neighbouring numbers of fp16 are farther apart than a step
    on, rng, memory = (
        make_wire(Compression(**up), Compression(), seed, {}),
        generator("bound", seed),
        {},
    )
    rate, start = 10.0**power, {k: torch.zeros(s) for k, s in SCHEMA.items()}
    reached = compute_reach(training, rate, 3)
    assert reached is not None
    for round_ in range(3):
        asked = replace(OPEN.expected, round=round_)
        plain = replace(OPEN, expected=asked, start=start, bounds=Bounds(1000, training, rate))
        delta = {k: torch.randn(s, generator=rng) for k, s in SCHEMA.items()}
        if reached.per_element:  # every element as far as it can be moved
            delta = {k: reached.gain * v.sign() for k, v in delta.items()}
        else:
            delta = scale(delta, reached.gain / float(norm(delta)))
        validate_update(plain, reply(encode(delta), round=round_))
        payload, memory = encode_update(on, delta, memory, round_, 2)
        rates = rate * (round_ + 1 if on.feedback else 1)  # what was left out comes later
        bounds = Bounds(1000, training, rates)
        through = replace(plain, bounds=bounds, wire=on, site_numbers={"site": 2})
        validate_update(through, reply(payload, round=round_))


def test_the_bound_of_random_k_is_the_plain_one_over_its_density() -> None:
    # of 4096 values at most a tenth is kept, so what arrives is ten times as large
    on = line(sparsify="random-k", dtype="fp16")
    open_ = opening(on)
    for factor, passes in ((1.0, True), (1.1, False)):
        delta = scale({k: torch.ones(s) for k, s in SCHEMA.items()}, 0.03 * factor)
        found = decode_update(on, sent(on, delta), SCHEMA, 7, 2)
        assert max(float(v.max()) for v in found.values()) == pytest.approx(0.3 * factor, rel=0.01)
        message = reply(sent(on, delta))
        if passes:
            validate_update(open_, message)
        else:
            with pytest.raises(RefusedError, match=r"^change-too-large: "):
                validate_update(open_, message)


@pytest.mark.parametrize("to", [lambda o: replace(o, site_numbers={"site": 1}), lambda o: o])
def test_places_that_both_sides_draw_go_by_the_sites_number(
    to: Callable[[OpenRound], OpenRound],
) -> None:
    on = line(sparsify="random-k", dtype="fp32", feedback=True)
    found = to(opening(on))
    right = validate_update(found, reply(sent(on))).leaves
    at = right["large"].nonzero(as_tuple=True)
    # only with the number that drew them are the values where they were
    same = torch.equal(right["large"][at], DELTA["large"][at])
    assert same == (found.site_numbers["site"] == 2)
