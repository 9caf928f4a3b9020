"""A payload that may be hostile: its header is read by us before a library meets it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError

from fedgen_edge.engines.exchange import LONGEST
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import largest
from fedgen_edge.types import Leaves
from fedgen_edge.uplink.transform import Schema, decode, length


def opened(payload: bytes, schema: Schema) -> Leaves:
    """The leaves of a payload: those of the schema, all and only, and finite.

    A shape that would broadcast is another shape. Values lie one after another, in the order of
    names, without gaps.

    Args:
        payload: its length is bounded already.
        schema: what must be in it; where that is nothing, the payload is not looked at.

    Raises:
        RefusedError: with one of the codes of `gate.CODES`.
    """
    if not schema:
        return {}
    _manifest(payload, schema)
    try:
        found = decode(payload)
    except SafetensorError:  # it may be stricter than we are, in this version or another
        raise RefusedError("bad-header", "the payload is no safetensors file") from None
    for name, leaf in found.items():
        if not math.isfinite(largest(leaf)):
            raise RefusedError("not-finite", f"{shown(name)} has values that are not finite")
    return found


def shown(value: object, most: int = 60) -> str:
    """What a site said, fit to be printed: escaped, on one line, and short."""
    text = ascii(value if isinstance(value, str) else str(value)[: 2 * most])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _manifest(payload: bytes, schema: Schema) -> None:
    whole = length(schema)
    if len(payload) < 8:
        raise RefusedError("wrong-length", f"the payload has {len(payload)} bytes of {whole}")
    values = 4 * sum(math.prod(shape) for shape in schema.values())
    size, most = int.from_bytes(payload[:8], "little"), max(LONGEST, whole - 8 - values)
    if size > most:
        raise RefusedError("header-too-long", f"its header says to have {size} bytes, over {most}")
    if size > len(payload) - 8:
        raise RefusedError("bad-header", f"its header says to have {size} bytes, beyond its end")
    _entries(_parsed(payload[8 : 8 + size]), schema)
    if len(payload) != 8 + size + values:
        raise RefusedError("wrong-length", f"the payload has {len(payload)} bytes of {whole}")


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise RefusedError("bad-header", "the payload's header is no JSON") from None
    if not isinstance(header, dict):
        raise RefusedError("bad-header", "the payload's header is no object")
    return header


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError("bad-header", "the payload's header says a name twice")
    return found


def _entries(header: Mapping[str, Any], schema: Schema) -> None:
    for code, names in (
        ("extra-leaf", sorted(header.keys() - schema.keys())),
        ("missing-leaf", sorted(schema.keys() - header.keys())),
    ):
        if names:
            raise RefusedError(code, f"{shown(names[0])}, of {len(names)}")
    at = 0
    for name, shape in sorted(schema.items()):
        entry, end = header[name], at + 4 * math.prod(shape)
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise RefusedError(
                "bad-header", f"{shown(name)} is not told by type, shape and offsets"
            )
        for code, what, theirs, ours in (
            ("wrong-type", "type", entry["dtype"], "F32"),
            ("wrong-shape", "shape", entry["shape"], list(shape)),
            ("wrong-offsets", "offsets", entry["data_offsets"], [at, end]),
        ):
            # as JSON, where true is not 1 and 1.0 is not 1
            if json.dumps(theirs) != json.dumps(ours):
                raise RefusedError(
                    code, f"{shown(name)}: its {what} is {shown(theirs)}, not {shown(ours)}"
                )
        at = end
