"""The upload gate: what a site's answer must be before the server makes anything of it.

Checks come in order of their cost, and each refusal has a code that stays. Who the site is, the
carrier has settled. What a hostile site said is never printed as it is.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedgen_edge.algorithms.clusters import of, plain
from fedgen_edge.engines.bounds import Bounds, spectrum, strayed
from fedgen_edge.engines.exchange import Answer, Kind, Reply, Terms, digest, read
from fedgen_edge.engines.payload import opened, shown
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import largest
from fedgen_edge.types import Leaves
from fedgen_edge.uplink.wire import Wire, came_up, most_up, slack, stretch

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

ABSURD = 1e15
"""Beyond this no honest number is; below it, sums of float32 squares stay finite."""


@dataclass(frozen=True)
class Asked:
    """What an answer must answer."""

    kind: Kind
    terms: Terms
    round: int
    attempt: int
    base: str
    """SHA-256 of the payload that was sent."""


@dataclass(frozen=True)
class Open:
    """The open round, as the server knows it."""

    asked: Asked
    schema: Mapping[str, tuple[int, ...]]
    """Shapes of the leaves that are sent back, all and only."""
    start: Leaves
    """The adapter that the sites received."""
    bounds: Bounds
    weights: Mapping[str, int]
    """Training examples that each site joined with."""
    wire: Wire = field(default_factory=Wire)
    """How leaves travel."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Each site's, by its name."""
    clusters: int = 0
    """Adapters that the sites chose from, of which each sends back one's leaves; 0 is one for all.
    """

    @property
    def widened(self) -> Bounds:
        """The bounds of what training moved, as wide as its way here makes an honest change."""
        stretched = self.bounds.stretch * stretch(self.wire)
        return replace(self.bounds, stretch=stretched, slack=slack(self.wire, self.asked.round))

    def of(self, cluster: int | None) -> "Open":
        """The same, where one cluster's leaves may come back, all and only (none: as it is)."""
        if cluster is None:
            return self
        start = of(self.start, cluster)
        schema = {name: shape for name, shape in self.schema.items() if name in start}
        return replace(self, schema=schema, start=start, clusters=0)

    @property
    def longest(self) -> int:
        """Bytes of an honest payload, at most."""
        each = range(self.clusters) if self.clusters else (None,)
        return max(most_up(self.wire, self.of(cluster).schema) for cluster in each)


@dataclass(frozen=True)
class Accepted:
    """A training answer that may count."""

    leaves: Leaves
    """How the leaves changed, all finite."""
    weight: int
    loss: float
    steps: int
    sha256: str
    """Of the payload, in hexadecimal."""
    lost: bool = False
    """Whether the site lacks what it kept with its last payload that counts."""


@dataclass
class Gate:
    """One attempt at a round: each site's answer counts once."""

    open: Open
    taken: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The message of each site that counts: its line, and SHA-256 of its payload."""

    def take(self, reply: Reply) -> Accepted | None:
        """What counts now; none for the same bytes again, which are acknowledged and no more.

        A message that was refused does not count, so a better one may follow it.

        Raises:
            RefusedError: with one of `CODES`.
        """
        if reply.site not in self.taken:
            accepted = judged(self.open, reply)
            self.taken[reply.site] = reply.line, accepted.sha256
            return accepted
        if self.taken[reply.site] != (reply.line, digest(reply.payload)):
            raise RefusedError("duplicate", "the site has sent another answer to this work before")
        return None


def event_of(error: RefusedError) -> str:
    """What the audit log calls it: a site that says itself that it cannot, offends nobody."""
    return "declined" if error.code == "declined" else "refused"


def judged(open_: Open, reply: Reply) -> Accepted:
    """A site's answer to training work, decoded; nothing is remembered.

    Raises:
        RefusedError: with one of `CODES`.
    """
    answer = answered(open_.asked, reply, open_.longest)
    weight, loss, steps = _said(open_, reply.site, answer.said)
    open_ = open_.of(answer.said.get("cluster"))
    found = _change(open_, reply.site, answer.payload)
    start, moved = plain(open_.start), plain(found)  # bounds go by the names of training
    if excess := strayed(open_.widened, steps, start, moved):
        raise RefusedError("change-too-large", excess)
    limit = open_.bounds.spectrum
    if limit is not None and (changed := spectrum(start, moved)) > limit:
        raise RefusedError(
            "spectrum-too-large",
            f"a product changed by {changed:.3g}, and spectrum={limit} in federation.toml",
        )
    far = max(map(largest, found.values()), default=0.0)
    if far > ABSURD:
        raise RefusedError("change-too-large", f"an element changed by {far:.3g}")
    lost = "lost" in answer.said
    return Accepted(found, weight, loss, steps, digest(answer.payload), lost)


def _change(open_: Open, site: str, payload: bytes) -> Leaves:
    """How the leaves changed, all and only those that were asked for, and finite."""
    if not open_.wire.up.stages:
        return opened(payload, open_.schema)
    return came_up(open_.wire, payload, open_.schema, open_.asked.round, open_.numbers[site])


def answered(asked: Asked, reply: Reply, longest: int = 0) -> Answer:
    """A site's answer to any work, its line read; numbers and payload are not judged yet.

    Args:
        asked: the work.
        reply: what the carrier brought.
        longest: bytes that its payload may have.

    Raises:
        RefusedError: it is too long, cannot be read, declines, or answers something else.
    """
    if len(reply.payload) > longest:
        raise RefusedError(
            "payload-too-long",
            f"the payload has {len(reply.payload)} bytes, and {longest} were asked for",
        )
    answer = read(Answer, reply.line, reply.payload)
    if answer.refused is not None:
        reason = f"{shown(answer.refused)}, {shown(answer.said.get('reason', ''), 200)}"
        raise RefusedError("declined", f"the site says {reason}")
    when = "stale-round" if answer.round < asked.round else "future-round"
    for code, theirs, ours in (
        ("wrong-kind", answer.kind, asked.kind),
        ("wrong-run", answer.terms.run, asked.terms.run),
        ("wrong-recipe", answer.terms.recipe, asked.terms.recipe),
        ("wrong-backbone", answer.terms.backbone, asked.terms.backbone),
        (when, answer.round, asked.round),
        ("wrong-attempt", answer.attempt, asked.attempt),
        ("wrong-base", answer.base, asked.base),
    ):
        if theirs != ours:
            raise RefusedError(code, f"it says {shown(theirs)}, and {shown(ours)} was asked for")
    return answer


def numbers(
    said: Mapping[str, Any], sums: Collection[str], counts: Collection[str] = ("count",)
) -> dict[str, float]:
    """What a site says of an evaluation: each sum and count, and nothing else.

    Args:
        said: by the site.
        sums: names of finite numbers.
        counts: names of finite numbers that are not negative.

    Raises:
        RefusedError: `bad-numbers`.
    """
    if said.keys() != {*sums, *counts}:
        odd = sorted(said.keys() ^ {*sums, *counts})[0]
        raise RefusedError("bad-numbers", f"{shown(odd)} is missing, or was not asked for")
    found: dict[str, float] = {}
    for name, value in said.items():
        number = _number(value)
        if number is None or (name in counts and number < 0):
            raise RefusedError("bad-numbers", f"{shown(name)} is {shown(value)}")
        found[name] = float(number)
    return found


def weighed(value: object, largest: int) -> int:
    """A number of training examples, from what a site says of it.

    9.0 is 9: a weight is a float where it is used, and writers of JSON differ.

    Args:
        value: what it says.
        largest: that it may be.

    Raises:
        RefusedError: `bad-weight`.
    """
    number = _number(value)
    if number is None or number != int(number) or not 1 <= number <= largest:
        said = f"weight is {shown(value)}, and must be a whole number from 1 to {largest}"
        raise RefusedError("bad-weight", said)
    return int(number)


def taken(value: object, clusters: int) -> int:
    """The cluster that a site says.

    Raises:
        RefusedError: `bad-cluster`.
    """
    if type(value) is not int or not 0 <= value < clusters:
        said = f"cluster is {shown(value)}, and must be from 0 to {clusters - 1}"
        raise RefusedError("bad-cluster", said)
    return value


def _number(value: object) -> int | float | None:
    """The value, if it is a finite number and no flag."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def _said(open_: Open, site: str, said: Mapping[str, Any]) -> tuple[int, float, int]:
    """Weight, loss and steps; and the cluster is one of those that there are."""
    joined = open_.weights.get(site)
    if joined is None:
        raise RefusedError("unknown-site", f"{shown(site)} has not joined this run")
    wanted = ("weight", "loss", "steps", *(["cluster"] if open_.clusters else []))
    if said.keys() - {"lost"} != {*wanted} or said.get("lost", True) is not True:
        raise RefusedError("bad-numbers", f"training is told by {', '.join(wanted)}")
    weight = weighed(said["weight"], open_.bounds.weight)
    if weight != joined:
        raise RefusedError("bad-weight", f"weight is {weight}, and was {joined} when it joined")
    loss = _number(said["loss"])
    if loss is None or abs(loss) > ABSURD:
        raise RefusedError("bad-loss", f"loss is {shown(said['loss'])}: training may have diverged")
    steps, most = said["steps"], open_.bounds.steps(weight)
    if type(steps) is not int or steps < 1 or (most is not None and steps > most):
        raise RefusedError("bad-steps", f"steps are {shown(steps)}, and must be from 1 to {most}")
    if open_.clusters:
        taken(said["cluster"], open_.clusters)
    return weight, float(loss), steps
