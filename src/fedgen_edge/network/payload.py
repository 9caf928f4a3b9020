"""A payload that may be hostile: its header is read by us before a library meets it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError

from fedgen_edge.compression.serialize import Schema, count_encoded_bytes, decode
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import max_magnitude
from fedgen_edge.network.messages import MAX_LINE_BYTES
from fedgen_edge.types import Leaves


def decode_payload(payload: bytes, schema: Schema) -> Leaves:
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
    _check_header(payload, schema)
    try:
        leaves = decode(payload)
    except SafetensorError:  # it may be stricter than we are, in this version or another
        raise RefusedError("bad-header", "the payload is no safetensors file") from None
    for name, leaf in leaves.items():
        if not math.isfinite(max_magnitude(leaf)):
            raise RefusedError("not-finite", f"{escape_value(name)} has values that are not finite")
    return leaves


def escape_value(value: object, max_length: int = 60) -> str:
    """What a site said, fit to be printed: escaped, on one line, and short."""
    text = ascii(value if isinstance(value, str) else str(value)[: 2 * max_length])
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def _check_header(payload: bytes, schema: Schema) -> None:
    total_length = count_encoded_bytes(schema)
    if len(payload) < 8:
        raise RefusedError(
            "wrong-length", f"the payload has {len(payload)} bytes of {total_length}"
        )
    value_bytes = 4 * sum(math.prod(shape) for shape in schema.values())
    size, max_header_bytes = (
        int.from_bytes(payload[:8], "little"),
        max(MAX_LINE_BYTES, total_length - 8 - value_bytes),
    )
    if size > max_header_bytes:
        raise RefusedError(
            "header-too-long", f"its header says to have {size} bytes, over {max_header_bytes}"
        )
    if size > len(payload) - 8:
        raise RefusedError("bad-header", f"its header says to have {size} bytes, beyond its end")
    _check_entries(_parse_header(payload[8 : 8 + size]), schema)
    if len(payload) != 8 + size + value_bytes:
        raise RefusedError(
            "wrong-length", f"the payload has {len(payload)} bytes of {total_length}"
        )


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError):
        raise RefusedError("bad-header", "the payload's header is no JSON") from None
    if not isinstance(header, dict):
        raise RefusedError("bad-header", "the payload's header is no object")
    return header


def _reject_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise RefusedError("bad-header", "the payload's header says a name twice")
    return entries


def _check_entries(header: Mapping[str, Any], schema: Schema) -> None:
    for code, names in (
        ("extra-leaf", sorted(header.keys() - schema.keys())),
        ("missing-leaf", sorted(schema.keys() - header.keys())),
    ):
        if names:
            raise RefusedError(code, f"{escape_value(names[0])}, of {len(names)}")
    offset = 0
    for name, shape in sorted(schema.items()):
        entry, end = header[name], offset + 4 * math.prod(shape)
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise RefusedError(
                "bad-header", f"{escape_value(name)} is not told by type, shape and offsets"
            )
        for code, property_name, received, expected in (
            ("wrong-type", "type", entry["dtype"], "F32"),
            ("wrong-shape", "shape", entry["shape"], list(shape)),
            ("wrong-offsets", "offsets", entry["data_offsets"], [offset, end]),
        ):
            # as JSON, where true is not 1 and 1.0 is not 1
            if json.dumps(received) != json.dumps(expected):
                raise RefusedError(
                    code,
                    f"{escape_value(name)}: its {property_name} is "
                    f"{escape_value(received)}, not {escape_value(expected)}",
                )
        offset = end
