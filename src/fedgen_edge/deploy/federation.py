"""A run whose clients are sites: what `federate` needs, and what is asked after the last round."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Settings
from fedgen_edge.deploy.audit import Audit
from fedgen_edge.deploy.roll import COUNTS, Roll
from fedgen_edge.deploy.settings import Federation
from fedgen_edge.engines.bounds import Bounds
from fedgen_edge.engines.exchange import Answer, Carrier, Kind, Terms, Work, digest
from fedgen_edge.engines.gate import Asked, answered, numbers, weighed
from fedgen_edge.engines.remote import Distant, Remote
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.experiments.build import Sums, added, rate_of
from fedgen_edge.experiments.checkpoint import Memory
from fedgen_edge.leaves import select
from fedgen_edge.rounds import Engine, cohort_size
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import Learnt
from fedgen_edge.types import Leaves, ServerState
from fedgen_edge.uplink.transform import encode

AGAIN = 30.0
"""Seconds after which a site that did not join is asked to again."""
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
    """Names of the sites that may take part now."""
    tell: Callable[[str], None] = print
    """Shows the operator a line."""
    watched: Callable[[Sequence[str]], None] = unwatched
    """Told who is there."""
    greeted: set[str] = field(default_factory=set)
    """Sites that have joined since they came, or since the server did."""
    invited: dict[str, float] = field(default_factory=dict)
    """When each was asked to, by a clock that only goes on."""

    @property
    def names(self) -> list[str]:
        """Sites by their numbers."""
        return self.roll.names

    @property
    def wanted(self) -> int:
        """Updates that a round wants."""
        plan, count = self.settings.federation, len(self.members())
        if plan.cohort is not None:
            return min(plan.cohort, max(1, count))
        return cohort_size(replace(plan, clients=None), max(1, count))

    @property
    def quorum(self) -> int:
        """Updates that a round needs."""
        return max(1, math.ceil(self.plan.quorum * self.wanted))

    @property
    def engine(self) -> Engine:
        """Sites, over the network."""
        return Remote(self.carrier, self.wanted, self.quorum, self.plan.deadline)

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
            self.audit.write,
        )

    def start(self) -> ServerState:
        """The server before the first round: as on one machine."""
        rng = generator(self.settings.federation.seed, "init")
        return self.algorithm.init(self.task.init(rng))

    def remembering(self, memory: Memory) -> "Deployment":
        """The same: what sites keep is theirs."""
        del memory
        return self

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
        payload = b"" if bare else self.payload(state.adapter)
        said = self.ask("evaluate", state.round, payload, names)
        parts = {"validation"} | ({"test"} if self._over(state.round) else set())
        found = {}
        for name, answer in said:
            try:
                found[name] = {part: sums(answer.said.get(part)) for part in parts}
            except RefusedError as error:
                self.offended(name, state.round, error)
        return found

    def ask(
        self, kind: Kind, round_: int, payload: bytes, names: Sequence[str]
    ) -> Iterator[tuple[str, Answer]]:
        """Have sites do other work than training; what is not as it must be is left out.

        Args:
            kind: of the work.
            round_: rounds that are committed.
            payload: leaves that go with it.
            names: whom to ask.
        """
        counted, at = self._counted(round_), self.roll.numbers()
        work = {
            name: Work(kind, self.terms, at[name], round_, 0, counted.get(name), payload)
            for name in names
        }
        asked = Asked(kind, self.terms, round_, 0, digest(payload))
        with closing(self.carrier.exchange(work, self.plan.deadline)) as replies:
            for reply in replies:
                if reply.failed is not None:
                    self.audit.write("failed", site=reply.site, round=round_)
                    self.tell(f"{reply.site}: {reply.failed}")
                    continue
                try:
                    yield reply.site, answered(asked, reply)
                except RefusedError as error:
                    self.offended(reply.site, round_, error)

    def payload(self, adapter: Leaves) -> bytes:
        """The leaves that travel, encoded."""
        shared = self.algorithm.sends(list(adapter))
        return encode(select(adapter, shared.__contains__))

    def _over(self, round_: int) -> bool:
        return round_ >= self.settings.federation.rounds

    def able(self) -> set[str]:
        """Sites that may take part: neither revoked, nor left out for offending too often."""
        offences = self.audit.offences()
        return {name for name in self.members() if offences[name] < self.plan.offences}

    def ready(self) -> list[str]:
        """Sites that are there, may take part, and have joined; who has come (back) is asked to.

        A site that offended too often is left out.
        """
        able = self.able()
        there = [name for name in self.carrier.present() if name in able]
        self.greeted.intersection_update(there)
        now = time.monotonic()
        new = [
            name
            for name in there
            if name not in self.greeted and now - self.invited.get(name, -math.inf) > AGAIN
        ]
        if new:
            self.roll.enrol(new)
            self.invited.update(dict.fromkeys(new, now))
            for name, answer in self.ask("join", 0, b"", new):
                self._join(name, answer)
        self.watched(there)
        return [name for name in there if name in self.greeted]

    def _join(self, name: str, answer: Answer) -> None:
        """Let a site in that says how much it has: as much as before, if it was in before."""
        try:
            weight, counts = self._entry(answer, self.roll.weights().get(name))
        except RefusedError as error:
            self.offended(name, 0, error)
            return
        self.roll.joined(name, weight, counts)
        self.greeted.add(name)
        self.audit.write("joined", site=name)
        self.tell(f"{name} joined, with {weight} training examples")

    def _entry(self, answer: Answer, before: int | None) -> tuple[int, dict[str, int]]:
        weight = weighed(answer.said.get("weight"), self.plan.largest_weight)
        counts = numbers({k: answer.said.get(k) for k in COUNTS}, (), COUNTS)
        if before not in {None, weight}:
            raise RefusedError("bad-weight", f"it has {weight} training examples, had {before}")
        return weight, {k: int(v) for k, v in counts.items()}

    def offended(self, name: str, round_: int, error: RefusedError) -> None:
        """Write down that a site's answer does not count."""
        event = "declined" if error.code == "declined" else "refused"
        self.audit.write(event, site=name, round=round_, code=error.code)
        self.tell(f"{name}: {event}: {error}")

    def _bounds(self, round_: int) -> Bounds:
        return Bounds(
            self.plan.largest_weight,
            self.settings.training,
            rate_of(self.settings, self.algorithm, round_),
            self.task.phases,
            self.plan.spectrum,
        )

    def _attempt(self, round_: int) -> int:
        return sum(
            line["event"] == "opened" and line["round"] == round_ for line in self.audit.lines
        )

    def _counted(self, committed: int) -> Mapping[str, str]:
        return {name: taken.payload for name, taken in self.audit.accepted(committed).items()}


def chosen(
    seed: int, round_: int, there: Sequence[str], numbers: Mapping[str, int], count: int
) -> list[int]:
    """So many of the sites that are there, in the order of their numbers.

    Drawn as on one machine: the same shuffle of all, of which those that are away are left out.
    """
    order = torch.randperm(len(numbers), generator=generator(seed, "sample", round_)).tolist()
    able = {numbers[name] for name in there}
    return sorted([number for number in order if number in able][:count])


def sums(said: object) -> Sums:
    """Held-out sums as a site says them.

    Raises:
        RefusedError: they are not sums.
    """
    if not isinstance(said, dict) or not {"total", "count"} <= said.keys() or len(said) > 8:
        raise RefusedError("bad-numbers", "an evaluation is told by sums, total and count of them")
    return numbers(said, said.keys() - {"count"})
