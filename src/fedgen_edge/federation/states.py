"""The server's state as one safetensors file: each field under a name of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgen_edge.compression.serialize import decode, encode
from fedgen_edge.types import Leaves, Queue, RoundTrip, ServerState

LEAF_FIELDS = ("adapter", "first_moment", "second_moment", "method")
"""Fields of a server's state that are leaves; a leaf's name follows the field's."""


def encode_server_state(state: ServerState) -> bytes:
    """The state but for its round, which whoever stores it writes beside it."""
    leaves = {f"{of}/{k}": v for of in LEAF_FIELDS for k, v in getattr(state, of).items()}
    versions = {
        f"versions/{version}/{k}": v
        for version, adapter in state.versions.items()
        for k, v in adapter.items()
    }
    losses = {} if state.losses is None else {"losses": state.losses}
    return encode({**leaves, **versions, **losses, **_encode_queue(state.queue)})


def decode_server_state(round_: int, payload: bytes) -> ServerState:
    """The state after so many rounds."""
    stored = decode(payload)
    versions: dict[int, Leaves] = {}
    for name, leaf in _select_field(stored, "versions").items():
        version, _, leaf_name = name.partition("/")
        versions.setdefault(int(version), {})[leaf_name] = leaf
    return ServerState(
        round_,
        **{of: _select_field(stored, of) for of in LEAF_FIELDS},
        losses=stored.get("losses"),
        queue=_decode_queue(stored),
        versions=versions,
    )


def _select_field(stored: Leaves, name: str) -> Leaves:
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}


def _encode_queue(queue: Queue) -> Leaves:
    return {
        "clock": _to_float64(queue.clock),
        "draws": torch.tensor(queue.draws),
        "trips": _to_float64(queue.trips).reshape(-1, len(RoundTrip._fields)),
    }


def _decode_queue(stored: Leaves) -> Queue:
    trips = [
        RoundTrip(int(client), int(version), end, bool(arrives), int(bytes_sent))
        for client, version, end, arrives, bytes_sent in stored["trips"].tolist()
    ]
    return Queue(float(stored["clock"]), int(stored["draws"]), tuple(trips))


def _to_float64(values: float | Sequence[RoundTrip]) -> Tensor:
    """It holds seconds, and whole numbers up to 2^53."""
    return torch.tensor(values, dtype=torch.float64)
