"""The gate, where changes travel through a chain: what is not made by it is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attacks import DELTA, OPEN, SCHEMA, reply

from fedgen_edge.config import Downlink, Uplink
from fedgen_edge.engines.gate import Open, judged
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import scale
from fedgen_edge.types import Leaves
from fedgen_edge.uplink.compress import sizes
from fedgen_edge.uplink.wire import Wire, came_up, made, most_up, sent_up, stretch

SHORT = {"keep": "top-k", "density": 0.1, "values": "int8", "block": 16}


def line(**up: object) -> Wire:
    return made(Uplink(**{**SHORT, **up}), Downlink(), 0, {})  # pyright: ignore[reportArgumentType]


def opening(on: Wire) -> Open:
    """The open round of a run whose changes travel so; the site is its third."""
    bounds = replace(OPEN.bounds, stretch=stretch(on))
    return replace(OPEN, wire=on, numbers={"site": 2}, bounds=bounds)


def sent(on: Wire, delta: Leaves = DELTA) -> bytes:
    return sent_up(on, delta, {}, 7, 2)[0]


PLAIN, FRAMED, HALVES = line(), line(zstd=3), line(keep="all", values="int4")
HONEST = sent(PLAIN)
PARTS = sizes(PLAIN.up, SCHEMA)


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
    "leaves by name": ("payload-too-long", PLAIN, sent(made(Uplink(), Downlink(), 0, {}))),
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
        judged(opening(on), reply(payload))
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("on", [PLAIN, FRAMED, HALVES, line(keep="random-k"), line(rank=1)])
def test_what_an_honest_site_makes_counts_as_in_a_simulation(on: Wire) -> None:
    payload = sent(on)
    found = judged(opening(on), reply(payload)).leaves
    expected = came_up(on, payload, SCHEMA, 7, 2)
    assert all(torch.equal(found[k], expected[k]) for k in SCHEMA)
    assert len(payload) <= most_up(on, SCHEMA)


@pytest.mark.parametrize("to", [lambda o: replace(o, numbers={"site": 1}), lambda o: o])
def test_places_that_both_sides_draw_go_by_the_sites_number(to: Callable[[Open], Open]) -> None:
    on = line(keep="random-k", values="fp32", feedback=True)
    found = to(opening(on))
    right = judged(found, reply(sent(on))).leaves
    at = right["large"].nonzero(as_tuple=True)
    # only with the number that drew them are the values where they were
    same = torch.equal(right["large"][at], DELTA["large"][at])
    assert same == (found.numbers["site"] == 2)
