"""An honest message, and the attacks that are made of it, each with the code of its refusal."""

import io
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import Training
from fedgen_edge.leaves import scale
from fedgen_edge.network.bounds import Bounds
from fedgen_edge.network.gate import ExpectedReply, OpenRound
from fedgen_edge.network.messages import MAX_LINE_BYTES, PROTOCOL, Answer, Reply, Terms, encode_line
from fedgen_edge.seeds import generator

TERMS = Terms("0123456789abcdef" * 2, "recipe", "backbone")
SCHEMA = {"bias": (4, 3), "large": (64, 64), "m.lora_A": (2, 3), "m.lora_B": (4, 2)}
RNG = generator("gate")
START = {name: torch.randn(shape, generator=RNG) for name, shape in SCHEMA.items()}
# three steps of 0.01 reach 0.03 and a little more in an element
DELTA = {name: torch.rand(shape, generator=RNG) * 0.02 for name, shape in SCHEMA.items()}
PAYLOAD = encode(DELTA)
HEADER = PAYLOAD[8 : 8 + int.from_bytes(PAYLOAD[:8], "little")]
TEXT = HEADER.strip()
assert len(TEXT) < len(HEADER)  # some attacks need a filled header
DATA = PAYLOAD[8 + len(HEADER) :]
SAID = {"weight": 9, "loss": 1.5, "steps": 3}
OPEN = OpenRound(
    ExpectedReply("train", TERMS, round=7, attempt=1, base="b" * 64),
    SCHEMA,
    START,
    Bounds(1000, Training(batch=4), 0.01),
    {"site": 9},
)


def reply(payload: bytes = PAYLOAD, said: Mapping[str, Any] = SAID, **how: Any) -> Reply:
    """An answer of `site` to the open round, but for what is named."""
    how = {"kind": "train", "terms": TERMS, "round": 7, "attempt": 1, "base": "b" * 64, **how}
    return Reply("site", encode_line(Answer(said=dict(said), **how)), payload)


def said(**values: object) -> Reply:
    return reply(said={**SAID, **values})


def lined(old: str, new: str) -> Reply:
    """The honest line with one part of it written otherwise."""
    assert old in reply().line
    return replace(reply(), line=reply().line.replace(old, new))


def headed(header: bytes, data: bytes = DATA, size: int | None = None) -> Reply:
    """A payload of a header, filled up as far as there is room for it."""
    header = header.ljust(len(PAYLOAD) - 8 - len(data)) if size is None else header
    return reply((len(header) if size is None else size).to_bytes(8, "little") + header + data)


def renamed(name: str) -> Reply:
    """A leaf under another name; where it is long, a large leaf makes room."""
    table = json.loads(HEADER)
    room = table.pop("large")["data_offsets"]
    table[name] = {**table.pop("bias"), "data_offsets": [0, 48]}
    return headed(json.dumps(table).encode(), DATA[: len(DATA) - (room[1] - room[0])])


def entry(name: str, **values: object) -> Reply:
    """A header with one leaf told otherwise; there is room for it, as the data are cut off."""
    table = json.loads(HEADER)
    table[name] |= values
    return headed(json.dumps(table, separators=(",", ":")).encode(), DATA[:-128])


def leaf(name: str, value: torch.Tensor) -> Reply:
    return reply(encode({**DELTA, name: value}))


def odd(value: float) -> Reply:
    changed = DELTA["bias"].clone()
    changed[2, 1] = value
    return leaf("bias", changed)


def saved(write: Any) -> Reply:
    file = io.BytesIO()
    write(file)
    assert file.tell() < len(PAYLOAD)
    return reply(file.getvalue())


ONE = np.ones(3, np.float32)
ATTACKS: dict[str, tuple[str, Reply]] = {
    "not a number": ("not-finite", odd(math.nan)),
    "infinity": ("not-finite", odd(math.inf)),
    "minus infinity": ("not-finite", odd(-math.inf)),
    "turned shape": ("wrong-shape", leaf("bias", torch.zeros(3, 4))),
    "shape that would broadcast": ("wrong-shape", leaf("bias", torch.zeros(1, 3))),
    "one axis more": ("wrong-shape", entry("bias", shape=[4, 3, 1])),
    "shape of flags": ("wrong-shape", entry("bias", shape=[4, 3.0])),
    "shape that is no list": ("wrong-shape", entry("bias", shape={"4": 3})),
    "zero by huge": ("wrong-shape", entry("bias", shape=[0, 2**60])),
    "F64": ("wrong-type", entry("bias", dtype="F64")),
    "F16": ("wrong-type", leaf("bias", torch.zeros(4, 3).half())),
    "BF16": ("wrong-type", leaf("bias", torch.zeros(4, 3).bfloat16())),
    "I32": ("wrong-type", entry("bias", dtype="I32")),
    "type that is none": ("wrong-type", entry("bias", dtype=["F32"])),
    "missing": ("missing-leaf", reply(encode({k: v for k, v in DELTA.items() if k != "bias"}))),
    "no leaves": ("missing-leaf", reply((2).to_bytes(8, "little") + b"{}")),
    "extra": ("payload-too-long", reply(encode({**DELTA, "x": torch.zeros(1)}))),
    "extra in a place": ("extra-leaf", renamed("bia5")),
    "path as a name": ("extra-leaf", renamed("../x")),
    "long name": ("extra-leaf", renamed("x" * 10_000)),
    "newline in a name": ("extra-leaf", renamed("a\nb\x1b[31m")),
    "name that turns the text round": ("extra-leaf", renamed("\u202e\ud800")),
    "metadata": ("extra-leaf", renamed("__metadata__")),
    "name twice": ("bad-header", headed(b'{"bias":{},"bias":{}}')),
    "key twice": ("bad-header", headed(TEXT.replace(b'"shape"', b'"dtype"'))),
    "leaf told by more": ("bad-header", entry("bias", more=1)),
    "header that is a list": ("bad-header", headed(b"[]")),
    "deep header": ("bad-header", headed(b"[" * 5000, b"")),
    "header of no text": ("bad-header", headed(b"\xff\xfe{}")),
    "number too long to read": ("bad-header", headed(b"[" + b"9" * 5000 + b"]", b"")),
    "truncated by a byte": ("wrong-length", reply(PAYLOAD[:-1])),
    "truncated data": ("wrong-length", reply(PAYLOAD[: -len(DATA)])),
    "truncated header": ("bad-header", reply(PAYLOAD[:50])),
    "truncated length": ("wrong-length", reply(PAYLOAD[:5])),
    "empty payload": ("wrong-length", reply(b"")),
    "trailing byte": ("payload-too-long", reply(PAYLOAD + b"\0")),
    "trailing in place of filling": ("wrong-length", headed(TEXT, DATA + b"\0", len(TEXT))),
    "oversized header": ("header-too-long", headed(HEADER, DATA, 2**63)),
    "header just too long": ("header-too-long", headed(HEADER, DATA, MAX_LINE_BYTES + 1)),
    "header beyond the end": ("bad-header", headed(HEADER, DATA, len(PAYLOAD) - 7)),
    "header that ends early": ("bad-header", headed(HEADER, DATA, 60)),
    "header of nothing": ("bad-header", headed(HEADER, DATA, 0)),
    "overlapping": ("wrong-offsets", entry("m.lora_A", data_offsets=[0, 24])),
    "gapped": ("wrong-offsets", entry("m.lora_A", data_offsets=[16436, 16460])),
    "turned offsets": ("wrong-offsets", entry("bias", data_offsets=[48, 0])),
    "negative offsets": ("wrong-offsets", entry("bias", data_offsets=[-48, 0])),
    "pickle": ("header-too-long", reply(pickle.dumps({"bias": [0.0] * 12}))),
    "zipped pickle": ("header-too-long", saved(partial(torch.save, {"bias": torch.zeros(2)}))),
    "npy": ("header-too-long", saved(lambda file: np.save(file, ONE))),
    "npz": ("header-too-long", saved(lambda file: np.savez(file, bias=ONE))),
    "zero weight": ("bad-weight", said(weight=0)),
    "negative weight": ("bad-weight", said(weight=-9)),
    "huge weight": ("bad-weight", said(weight=1001)),
    "weight of no float": ("bad-weight", said(weight=10**400)),
    "weight with a fraction": ("bad-weight", said(weight=9.5)),
    "weight that is no number": ("bad-weight", lined('"weight":9', '"weight":NaN')),
    "infinite weight": ("bad-weight", lined('"weight":9', '"weight":1e999')),
    "weight that is a flag": ("bad-weight", said(weight=True)),
    "weight in words": ("bad-weight", said(weight="9")),
    "weight that has changed": ("bad-weight", said(weight=10)),
    "loss that is no number": ("bad-loss", lined("1.5", "NaN")),
    "infinite loss": ("bad-loss", lined("1.5", "-Infinity")),
    "absurd loss": ("bad-loss", said(loss=1e300)),
    "no loss": ("bad-loss", said(loss=None)),
    "negative steps": ("bad-steps", said(steps=-1)),
    "no steps": ("bad-steps", said(steps=0)),
    "steps over its examples": ("bad-steps", said(steps=4)),
    "steps as a float": ("bad-steps", said(steps=3.0)),
    "steps that are a flag": ("bad-steps", said(steps=True)),
    "a loss that is none": ("bad-numbers", said(lost=False)),
    "a loss in words": ("bad-numbers", said(lost="true")),
    "more numbers": ("bad-numbers", said(text="a private one")),
    "fewer numbers": ("bad-numbers", reply(said={"weight": 9, "loss": 1.5})),
    "stale round": ("stale-round", reply(round=6)),
    "future round": ("future-round", reply(round=8)),
    "earlier attempt": ("wrong-attempt", reply(attempt=0)),
    "other base": ("wrong-base", reply(base="c" * 64)),
    "other work": ("wrong-kind", reply(kind="evaluate")),
    "other run": ("wrong-run", reply(terms=replace(TERMS, run="f" * 32))),
    "other recipe": ("wrong-recipe", reply(terms=replace(TERMS, recipe="x\n" * 99))),
    "other backbone": ("wrong-backbone", reply(terms=replace(TERMS, backbone="x"))),
    "older protocol": ("wrong-protocol", reply(terms=replace(TERMS, protocol=0))),
    "newer protocol": ("wrong-protocol", reply(terms=replace(TERMS, protocol=PROTOCOL + 1))),
    "long line": ("line-too-long", said(text="x" * MAX_LINE_BYTES)),
    "line of no JSON": ("malformed", lined("{", "")),
    "line of no text": ("malformed", lined("train", "\ud800")),
    "deep line": ("malformed", lined("1.5", "[" * 9000 + "]" * 9000)),
    "line of another form": ("malformed", lined('"round":7', '"round":7.5')),
    "line with more": ("malformed", lined('"round":7', '"round":7,"more":1')),
    "refusal by the site": ("declined", reply(b"", {"reason": "no\n\x1b[31mdisk"}, refused="full")),
    "site that never joined": ("unknown-site", replace(reply(), site="other")),
    "boosted": ("change-too-large", reply(encode(scale(DELTA, 100.0)))),
    "one boosted element": ("change-too-large", odd(0.04)),
}  # fmt: skip
