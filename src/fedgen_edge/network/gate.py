"""The upload gate: what a site's answer must be before the server makes anything of it.

Checks come in order of their cost, and each refusal has a code that stays. Who the site is, the
carrier has settled. What a hostile site said is never printed as it is.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedgen_edge.algorithms.ifca import select_cluster, strip_cluster_prefix
from fedgen_edge.compression.wire import (
    Wire,
    decode_update,
    get_error_factor,
    get_error_margin,
    get_max_bytes_up,
)
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import max_magnitude
from fedgen_edge.network.bounds import Bounds, compute_spectral_norm, find_excess
from fedgen_edge.network.messages import Answer, Reply, Terms, WorkKind, decode_message, digest
from fedgen_edge.network.payload import decode_payload, escape_value
from fedgen_edge.types import Leaves

CODES = {
    "payload-too-long": "The payload is longer than the leaves that were asked for.",
    "line-too-long": "The message's line of JSON is longer than any honest one.",
    "malformed": "The message's line is not JSON of the form that was agreed.",
    "wrong-protocol": "The site runs a version that says its messages otherwise.",
    "declined": "The site says that it did not do the work, and why.",
    "wrong-kind": "It answers another kind of work.",
    "wrong-run": "It belongs to another run.",
    "wrong-recipe": "The site's settings differ from those that all share.",
    "wrong-backbone": "The site's frozen weights differ from those that all share.",
    "stale-round": "It answers a round that is over.",
    "future-round": "It answers a round that has not begun.",
    "wrong-attempt": "It answers another attempt at this round.",
    "wrong-base": "It was made from another adapter than the one that was sent.",
    "duplicate": "The site has already sent something else for this work.",
    "unknown-site": "The site has not joined.",
    "bad-numbers": "The numbers that it says are not those that were asked for, or not finite.",
    "bad-weight": "Its number of examples is no whole number within the bound, or has changed.",
    "bad-loss": "Its training loss is no finite number.",
    "bad-steps": "Its number of steps is none that its examples make.",
    "bad-cluster": "It says to have trained a cluster that there is not.",
    "wrong-length": "The payload's length is not that of the leaves that were asked for.",
    "header-too-long": "The payload says that its header is longer than any honest one: it may be "
    "no safetensors file.",
    "bad-header": "The payload's header cannot be read.",
    "extra-leaf": "It holds a leaf that was not asked for.",
    "missing-leaf": "It lacks a leaf that was asked for.",
    "wrong-type": "A leaf is not float32.",
    "wrong-shape": "A leaf has another shape.",
    "wrong-offsets": "A leaf's values are not where they must be.",
    "bad-frame": "The payload is not one whole frame of zstd.",
    "bad-positions": "It does not say at which places its values are, or says what cannot be.",
    "bad-values": "Its values are written as no honest sender writes them.",
    "not-finite": "A leaf has a value that is not a finite number.",
    "change-too-large": "A leaf moved farther than this recipe can move it.",
    "spectrum-too-large": "A layer's update changed more than the federation allows.",
}
"""Every refusal's code, and what it means."""

MAX_MAGNITUDE = 1e15
"""Beyond this no honest number is; below it, sums of float32 squares stay finite."""


@dataclass(frozen=True)
class ExpectedReply:
    """What an answer must answer."""

    kind: WorkKind
    terms: Terms
    round: int
    attempt: int
    base: str
    """SHA-256 of the payload that was sent."""


@dataclass(frozen=True)
class OpenRound:
    """The open round, as the server knows it."""

    expected: ExpectedReply
    schema: Mapping[str, tuple[int, ...]]
    """Shapes of the leaves that are sent back, all and only."""
    start: Leaves
    """The adapter that the sites received."""
    bounds: Bounds
    weights: Mapping[str, int]
    """Training examples that each site joined with."""
    wire: Wire = field(default_factory=Wire)
    """How leaves travel."""
    site_numbers: Mapping[str, int] = field(default_factory=dict)
    """Each site's, by its name."""
    clusters: int = 0
    """Adapters that the sites chose from, of which each sends back one's leaves; 0 is one for all.
    """

    @property
    def widened_bounds(self) -> Bounds:
        """The bounds of what training moved, as wide as its way here makes an honest change."""
        stretch_factor = self.bounds.stretch * get_error_factor(self.wire)
        return replace(
            self.bounds,
            stretch=stretch_factor,
            slack=get_error_margin(self.wire, self.expected.round),
        )

    def select_cluster(self, cluster: int | None) -> "OpenRound":
        """The same, where one cluster's leaves may come back, all and only (none: as it is)."""
        if cluster is None:
            return self
        start = select_cluster(self.start, cluster)
        schema = {name: shape for name, shape in self.schema.items() if name in start}
        return replace(self, schema=schema, start=start, clusters=0)

    @property
    def max_payload_bytes(self) -> int:
        """Bytes of an honest payload, at most."""
        cluster_numbers = range(self.clusters) if self.clusters else (None,)
        return max(
            get_max_bytes_up(self.wire, self.select_cluster(cluster).schema)
            for cluster in cluster_numbers
        )


@dataclass(frozen=True)
class AcceptedUpdate:
    """A training answer that may count."""

    leaves: Leaves
    """How the leaves changed, all finite."""
    weight: int
    loss: float
    steps: int
    sha256: str
    """Of the payload, in hexadecimal."""
    lost_memory: bool = False
    """Whether the site lacks what it kept with its last payload that counts."""


@dataclass
class Gate:
    """One attempt at a round: each site's answer counts once."""

    open_round: OpenRound
    accepted_messages: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The message of each site that counts: its line, and SHA-256 of its payload."""

    def accept(self, reply: Reply) -> AcceptedUpdate | None:
        """What counts now; none for the same bytes again, which are acknowledged and no more.

        A message that was refused does not count, so a better one may follow it.

        Raises:
            RefusedError: with one of `CODES`.
        """
        if reply.site not in self.accepted_messages:
            accepted = validate_update(self.open_round, reply)
            self.accepted_messages[reply.site] = reply.line, accepted.sha256
            return accepted
        if self.accepted_messages[reply.site] != (reply.line, digest(reply.payload)):
            raise RefusedError("duplicate", "the site has sent another answer to this work before")
        return None


def get_event_name(error: RefusedError) -> str:
    """What the audit log calls it: a site that says itself that it cannot, offends nobody."""
    return "declined" if error.code == "declined" else "refused"


def validate_update(open_round: OpenRound, reply: Reply) -> AcceptedUpdate:
    """A site's answer to training work, decoded; nothing is remembered.

    Raises:
        RefusedError: with one of `CODES`.
    """
    answer = read_answer(open_round.expected, reply, open_round.max_payload_bytes)
    weight, loss, steps = _validate_training_numbers(open_round, reply.site, answer.said)
    open_round = open_round.select_cluster(answer.said.get("cluster"))
    delta = _decode_delta(open_round, reply.site, answer.payload)
    start, plain_delta = (
        strip_cluster_prefix(open_round.start),
        strip_cluster_prefix(delta),
    )  # bounds go by the names of training
    if excess := find_excess(open_round.widened_bounds, steps, start, plain_delta):
        raise RefusedError("change-too-large", excess)
    limit = open_round.bounds.spectrum
    if limit is not None and (spectral_norm := compute_spectral_norm(start, plain_delta)) > limit:
        raise RefusedError(
            "spectrum-too-large",
            f"a product changed by {spectral_norm:.3g}, and spectrum={limit} in federation.toml",
        )
    largest_change = max(map(max_magnitude, delta.values()), default=0.0)
    if largest_change > MAX_MAGNITUDE:
        raise RefusedError("change-too-large", f"an element changed by {largest_change:.3g}")
    lost_memory = "lost" in answer.said
    return AcceptedUpdate(delta, weight, loss, steps, digest(answer.payload), lost_memory)


def _decode_delta(open_round: OpenRound, site: str, payload: bytes) -> Leaves:
    """How the leaves changed, all and only those that were asked for, and finite."""
    if not open_round.wire.up.stages:
        return decode_payload(payload, open_round.schema)
    return decode_update(
        open_round.wire,
        payload,
        open_round.schema,
        open_round.expected.round,
        open_round.site_numbers[site],
    )


def read_answer(expected: ExpectedReply, reply: Reply, max_bytes: int = 0) -> Answer:
    """A site's answer to any work, its line read; numbers and payload are not judged yet.

    Args:
        expected: the work.
        reply: what the carrier brought.
        max_bytes: bytes that its payload may have.

    Raises:
        RefusedError: it is too long, cannot be read, declines, or answers something else.
    """
    if len(reply.payload) > max_bytes:
        raise RefusedError(
            "payload-too-long",
            f"the payload has {len(reply.payload)} bytes, and {max_bytes} were asked for",
        )
    answer = decode_message(Answer, reply.line, reply.payload)
    if answer.refused is not None:
        reason = (
            f"{escape_value(answer.refused)}, {escape_value(answer.said.get('reason', ''), 200)}"
        )
        raise RefusedError("declined", f"the site says {reason}")
    round_code = "stale-round" if answer.round < expected.round else "future-round"
    for code, value, expected_value in (
        ("wrong-kind", answer.kind, expected.kind),
        ("wrong-run", answer.terms.run, expected.terms.run),
        ("wrong-recipe", answer.terms.recipe, expected.terms.recipe),
        ("wrong-backbone", answer.terms.backbone, expected.terms.backbone),
        (round_code, answer.round, expected.round),
        ("wrong-attempt", answer.attempt, expected.attempt),
        ("wrong-base", answer.base, expected.base),
    ):
        if value != expected_value:
            raise RefusedError(
                code,
                f"it says {escape_value(value)}, and {escape_value(expected_value)} was asked for",
            )
    return answer


def validate_numbers(
    answer_fields: Mapping[str, Any], sums: Collection[str], counts: Collection[str] = ("count",)
) -> dict[str, float]:
    """What a site says of an evaluation: each sum and count, and nothing else.

    Args:
        answer_fields: by the site.
        sums: names of finite numbers.
        counts: names of finite numbers that are not negative.

    Raises:
        RefusedError: `bad-numbers`.
    """
    if answer_fields.keys() != {*sums, *counts}:
        unexpected = sorted(answer_fields.keys() ^ {*sums, *counts})[0]
        raise RefusedError(
            "bad-numbers", f"{escape_value(unexpected)} is missing, or was not asked for"
        )
    values: dict[str, float] = {}
    for name, value in answer_fields.items():
        number = _to_finite_number(value)
        if number is None or (name in counts and number < 0):
            raise RefusedError("bad-numbers", f"{escape_value(name)} is {escape_value(value)}")
        values[name] = float(number)
    return values


def validate_weight(value: object, max_weight: int) -> int:
    """A number of training examples, from what a site says of it.

    9.0 is 9: a weight is a float where it is used, and writers of JSON differ.

    Args:
        value: what it says.
        max_weight: that it may be.

    Raises:
        RefusedError: `bad-weight`.
    """
    number = _to_finite_number(value)
    if number is None or number != int(number) or not 1 <= number <= max_weight:
        message = (
            f"weight is {escape_value(value)}, and must be a whole number from 1 to {max_weight}"
        )
        raise RefusedError("bad-weight", message)
    return int(number)


def validate_cluster(value: object, clusters: int) -> int:
    """The cluster that a site says.

    Raises:
        RefusedError: `bad-cluster`.
    """
    if type(value) is not int or not 0 <= value < clusters:
        message = f"cluster is {escape_value(value)}, and must be from 0 to {clusters - 1}"
        raise RefusedError("bad-cluster", message)
    return value


def _to_finite_number(value: object) -> int | float | None:
    """The value, if it is a finite number and no flag."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def _validate_training_numbers(
    open_round: OpenRound, site: str, answer_fields: Mapping[str, Any]
) -> tuple[int, float, int]:
    """Weight, loss and steps; and the cluster is one of those that there are."""
    joined_weight = open_round.weights.get(site)
    if joined_weight is None:
        raise RefusedError("unknown-site", f"{escape_value(site)} has not joined this run")
    field_names = ("weight", "loss", "steps", *(["cluster"] if open_round.clusters else []))
    if (
        answer_fields.keys() - {"lost"} != {*field_names}
        or answer_fields.get("lost", True) is not True
    ):
        raise RefusedError("bad-numbers", f"training is told by {', '.join(field_names)}")
    weight = validate_weight(answer_fields["weight"], open_round.bounds.weight)
    if weight != joined_weight:
        raise RefusedError(
            "bad-weight", f"weight is {weight}, and was {joined_weight} when it joined"
        )
    loss = _to_finite_number(answer_fields["loss"])
    if loss is None or abs(loss) > MAX_MAGNITUDE:
        raise RefusedError(
            "bad-loss", f"loss is {escape_value(answer_fields['loss'])}: training may have diverged"
        )
    steps, max_steps = answer_fields["steps"], open_round.bounds.steps(weight)
    if type(steps) is not int or steps < 1 or (max_steps is not None and steps > max_steps):
        raise RefusedError(
            "bad-steps", f"steps are {escape_value(steps)}, and must be from 1 to {max_steps}"
        )
    if open_round.clusters:
        validate_cluster(answer_fields["cluster"], open_round.clusters)
    return weight, float(loss), steps
