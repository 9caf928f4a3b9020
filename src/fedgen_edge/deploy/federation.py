"""A run whose clients are sites: what `federate` needs, and what is asked after the last round."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from fedgen_edge.adapters.ranks import truncated
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.client import rate_of
from fedgen_edge.config import Settings
from fedgen_edge.deploy.among import Among
from fedgen_edge.deploy.audit import Audit
from fedgen_edge.deploy.cohort import chosen, wanted
from fedgen_edge.deploy.roll import Roll
from fedgen_edge.deploy.said import entry, sums
from fedgen_edge.deploy.settings import Federation
from fedgen_edge.engines.bounds import Bounds
from fedgen_edge.engines.exchange import Answer, Carrier, Kind, Terms, Work, digest
from fedgen_edge.engines.gate import Asked, answered, event_of
from fedgen_edge.engines.remote import Distant, Remote
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.experiments.build import Sums, added, wire
from fedgen_edge.experiments.checkpoint import Memory
from fedgen_edge.jobs import Job
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import Learnt
from fedgen_edge.types import Leaves, Order, ServerState, Update
from fedgen_edge.uplink.transform import encode
from fedgen_edge.uplink.wire import Wire

AGAIN = 10.0
"""Seconds after which a site that did not join is asked to again."""
JOINING = 20.0
"""Seconds that a site has to say how much it has; its answer may be lost on the way."""
GLANCE = 0.5
"""Seconds between two looks at who is there."""


def unwatched(there: Sequence[str]) -> None:
    """Nobody wants to know."""
    del there


@dataclass(frozen=True)
class Deployment:
    """A run at many sites, while a carrier reaches them."""

    plan: Federation
    settings: Settings
    """Of the run; the server's own where machines have their own."""
    task: Learnt
    algorithm: Algorithm
    terms: Terms
    carrier: Carrier
    audit: Audit
    roll: Roll
    members: Callable[[], Sequence[str]]
    """Names of the sites that are not revoked."""
    tell: Callable[[str], None] = print
    """Shows the operator a line."""
    watched: Callable[[Sequence[str]], None] = unwatched
    """Told who is there."""
    greeted: set[str] = field(default_factory=set)
    """Sites that have joined since they came, or since the server did."""
    invited: dict[str, float] = field(default_factory=dict)
    """When each was asked to and did not, by a clock that only goes on."""
    known: MutableMapping[int, Leaves] = field(default_factory=dict)
    """What the method has each site remember, by its number: see `Distant.known`."""

    @property
    def names(self) -> list[str]:
        """Sites by their numbers."""
        return self.roll.names

    @property
    def wanted(self) -> int:
        """Updates that a round wants."""
        return wanted(self.settings.federation, len(self.able()))

    @property
    def quorum(self) -> int:
        """Updates that a round needs."""
        return max(1, math.ceil(self.plan.quorum * self.wanted))

    @property
    def reached(self) -> Carrier:
        """To those alone who may take part now."""
        return Among(self.carrier, self.able)

    def engine(self, orders: Sequence[Order], job: Job) -> Iterator[Update]:
        """Sites, over the network: as many are waited for as are wanted now."""
        return Remote(self.reached, self.wanted, self.quorum, self.plan.deadline)(orders, job)

    @cached_property
    def wire(self) -> Wire:
        """How leaves travel."""
        return wire(self.settings, self.start)

    @property
    def train(self) -> Distant:
        """A round's job."""
        return Distant(
            self.algorithm,
            self.terms,
            lambda: self.names,
            self.roll.weights,
            self._bounds,
            self._attempt,
            self._counted,
            self._note,
            self.wire,
            self.known,
        )

    def start(self) -> ServerState:
        """The server before the first round: as on one machine."""
        rng = generator(self.settings.federation.seed, "init")
        return self.algorithm.init(self.task.init(rng))

    def remembering(self, memory: Memory) -> "Deployment":
        """The same, with what the server itself works out of what its sites remember.

        What else they keep is theirs.
        """
        return replace(self, known=memory)

    def cohort(self, round_: int, losses: Tensor | None) -> list[int]:
        """Who is asked in a round: of those present, more than are wanted.

        The first round waits for all that it wants, a later one for its quorum; neither for ever.

        Raises:
            QuorumError: too few are there.
        """
        del losses
        until = time.monotonic() + self.plan.gather
        enough = self.wanted if round_ == 0 else self.quorum
        while len(there := self.ready()) < enough and time.monotonic() < until:
            time.sleep(GLANCE)
        if len(there) < self.quorum:
            raise QuorumError(
                f"round {round_ + 1} needs {self.quorum} sites, and {len(there)} are there: "
                f"{', '.join(there) or 'none'}"
            )
        asked = math.ceil(self.plan.over_selection * self.wanted)
        return chosen(self.settings.federation.seed, round_, there, self.roll.numbers(), asked)

    def validation(self, state: ServerState) -> dict[str, Any] | None:
        """Held-out sums of the sites that are there, together and site by site; none of nobody."""
        found = {
            name: said["validation"] for name, said in self.evaluated(state, self.ready()).items()
        }
        return added(found) if found else None

    def evaluated(
        self, state: ServerState, names: Sequence[str], *, bare: bool = False
    ) -> dict[str, dict[str, Sums]]:
        """What sites say of their models: sums of validation data, after the last round of test.

        Args:
            state: of the global adapter.
            names: whom to ask.
            bare: judge the backbone as it came instead.
        """
        bare_ones = dict.fromkeys(names, b"")
        payloads = bare_ones if bare else self.payloads(state.adapter, names)
        said = self.ask("evaluate", state.round, payloads)
        parts = {"validation"} | ({"test"} if self._over(state.round) else set())
        found = {}
        for name, answer in said:
            try:
                found[name] = {part: sums(answer.said.get(part), self.counts) for part in parts}
            except RefusedError as error:
                self.offended(name, state.round, error)
        return {name: found[name] for name in self.names if name in found}

    def ask(
        self, kind: Kind, round_: int, payloads: Mapping[str, bytes]
    ) -> Iterator[tuple[str, Answer]]:
        """Have sites do other work than training; what is not as it must be is left out.

        Args:
            kind: of the work.
            round_: rounds that are committed.
            payloads: whom to ask, and the leaves that go with it.
        """
        counted, at = self._counted(round_), self.roll.numbers()
        work = {
            name: Work(kind, self.terms, at[name], round_, 0, counted.get(name), payload)
            for name, payload in payloads.items()
        }
        left = set(payloads)
        # whoever joins has nothing to work on
        seconds = min(self.plan.gather, JOINING) if kind == "join" else self.plan.deadline
        with closing(self.reached.exchange(work, seconds)) as replies:
            for reply in replies:
                if reply.failed is not None:
                    self._note("failed", why=reply.failed, site=reply.site, round=round_)
                    continue
                base = digest(payloads.get(reply.site, b""))
                try:
                    answer = answered(Asked(kind, self.terms, round_, 0, base), reply)
                except RefusedError as error:
                    self.offended(reply.site, round_, error)
                    continue
                if reply.site in left:  # else it has said so before
                    left.remove(reply.site)
                    yield reply.site, answer

    def payloads(self, adapter: Leaves, names: Sequence[str]) -> dict[str, bytes]:
        """The leaves that travel to each of these sites, encoded."""
        at, shared = self.roll.numbers(), self.algorithm.shared(adapter)
        ranks = {name: self.algorithm.rank(at[name]) for name in names}
        found = {rank: encode(truncated(shared, rank)) for rank in {*ranks.values()}}
        return {name: found[rank] for name, rank in ranks.items()}

    def _over(self, round_: int) -> bool:
        return round_ >= self.settings.federation.rounds

    def ready(self) -> list[str]:
        """Sites that are there, may take part, and have joined; who has come (back) is asked to."""
        there = self.reached.present()
        self.greeted.intersection_update(there)
        now = time.monotonic()
        new = [
            name
            for name in there
            if name not in self.greeted and now - self.invited.get(name, -math.inf) > AGAIN
        ]
        if new:
            self.roll.enrol(new)
            for name, answer in self.ask("join", 0, dict.fromkeys(new, b"")):
                self._join(name, answer)
            again = [name for name in new if name not in self.greeted]
            self.invited.update(dict.fromkeys(again, time.monotonic()))
        self.watched(there)
        return [name for name in there if name in self.greeted]

    def _join(self, name: str, answer: Answer) -> None:
        """Let a site in that says how much it has: as much as before, if it was in before."""
        try:
            before = self.roll.weights().get(name)
            weight, counts = entry(answer.said, self.plan.largest_weight, before)
        except RefusedError as error:
            self.offended(name, 0, error)
            return
        self.roll.joined(name, weight, counts)
        self.greeted.add(name)
        self.audit.write("joined", site=name)
        self.tell(f"{name} joined, with {weight} training examples")

    def offended(self, name: str, round_: int, error: RefusedError) -> None:
        """Write down that a site's answer does not count."""
        self._note(event_of(error), why=str(error), site=name, round=round_, code=error.code)

    def able(self) -> list[str]:
        """Sites that may take part now: neither revoked, nor left out for too many offences."""
        offences = self.audit.offences()
        return [name for name in self.members() if offences[name] < self.plan.offences]

    def awaited(self) -> list[str]:
        """Sites that have joined, and may take part still."""
        able = self.able()
        return [name for name in self.roll.weights() if name in able]

    @property
    def counts(self) -> tuple[str, ...]:
        """What an evaluation counts."""
        return ("count", "words") if self.task.measure.material == "text" else ("count",)

    def _note(self, event: str, *, why: str = "", **fields: str | int) -> None:
        """Write a line of the audit log, and say why; a site that declines may have lost its run.

        So it is asked to join again, before anything else.
        """
        if why:
            self.tell(f"{fields['site']}: {event}: {why}")
        if event == "declined":
            self.greeted.discard(str(fields["site"]))
        self.audit.write(event, **fields)

    def _bounds(self, round_: int) -> Bounds:
        training, since = self.settings.training, round_
        if self.wire.feedback:  # what earlier rounds left out may come with this one
            since = 0
        rates = (rate_of(self.settings, self.algorithm, r) for r in range(since, round_ + 1))
        bound = not (self.wire.feedback and training.weight_decay)
        training = replace(training, clip=training.clip or self.plan.gradient or 0.0)
        return Bounds(
            self.plan.largest_weight,
            training,
            sum(rates),
            self.task.phases,
            self.plan.spectrum,
            1.0 if bound else math.inf,
        )

    def _attempt(self, round_: int) -> int:
        return sum(
            line["event"] == "opened" and line["round"] == round_ for line in self.audit.lines
        )

    def _counted(self, committed: int) -> Mapping[str, str]:
        return {name: taken.payload for name, taken in self.audit.accepted(committed).items()}
