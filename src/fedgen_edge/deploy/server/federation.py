"""A run whose clients are sites: what `federate` needs, and what is asked after the last round."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from fedgen_edge.adapters.ranks import truncate_rank
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.compression.serialize import encode
from fedgen_edge.compression.wire import Wire
from fedgen_edge.config import Settings
from fedgen_edge.deploy.members import MemberCarrier
from fedgen_edge.deploy.server.audit import Audit
from fedgen_edge.deploy.server.cohort import count_target_updates, sample_cohort
from fedgen_edge.deploy.server.registry import SiteRegistry
from fedgen_edge.deploy.server.site_reports import validate_join, validate_sums
from fedgen_edge.deploy.settings import DeploymentSettings
from fedgen_edge.errors import QuorumError, RefusedError
from fedgen_edge.federation.client import get_learning_rate
from fedgen_edge.federation.jobs import Job
from fedgen_edge.network.bounds import Bounds
from fedgen_edge.network.gate import ExpectedReply, get_event_name, read_answer
from fedgen_edge.network.messages import Answer, Carrier, Terms, WorkKind, WorkRequest, digest
from fedgen_edge.network.remote import Remote, RemoteTraining
from fedgen_edge.runs.build import Sums, build_wire, sum_statistics
from fedgen_edge.runs.checkpoint import ClientStateStore
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TrainableTask
from fedgen_edge.types import Leaves, Order, ServerState, Update

REINVITE_SECONDS = 10.0
"""Seconds after which a site that did not join is asked to again."""
JOIN_SECONDS = 20.0
"""Seconds that a site has to say how much it has; its answer may be lost on the way."""
POLL_SECONDS = 0.5
"""Seconds between two looks at who is there."""


def ignore_present(present: Sequence[str]) -> None:
    """Nobody wants to know."""
    del present


@dataclass(frozen=True)
class Deployment:
    """A run at many sites, while a carrier reaches them."""

    plan: DeploymentSettings
    settings: Settings
    """Of the run; the server's own where machines have their own."""
    task: TrainableTask
    algorithm: Algorithm
    terms: Terms
    carrier: Carrier
    audit: Audit
    registry: SiteRegistry
    members: Callable[[], Sequence[str]]
    """Names of the sites that are not revoked."""
    tell: Callable[[str], None] = print
    """Shows the operator a line."""
    on_present: Callable[[Sequence[str]], None] = ignore_present
    """Told who is there."""
    joined_sites: set[str] = field(default_factory=set)
    """Sites that have joined since they came, or since the server did."""
    invitation_times: dict[str, float] = field(default_factory=dict)
    """When each was asked to and did not, by a clock that only goes on."""
    client_states: MutableMapping[int, Leaves] = field(default_factory=dict)
    """What the method has each site remember, by its number: see `RemoteTraining.known`."""

    @property
    def names(self) -> list[str]:
        """Sites by their numbers."""
        return self.registry.names

    @property
    def target_updates(self) -> int:
        """Updates that a round wants."""
        return count_target_updates(self.settings.federation, len(self.list_eligible_sites()))

    @property
    def quorum(self) -> int:
        """Updates that a round needs."""
        return max(1, math.ceil(self.plan.quorum * self.target_updates))

    @property
    def eligible_carrier(self) -> Carrier:
        """To those alone who may take part now."""
        return MemberCarrier(self.carrier, self.list_eligible_sites)

    def engine(self, orders: Sequence[Order], job: Job) -> Iterator[Update]:
        """Sites, over the network: as many are waited for as are wanted now."""
        return Remote(self.eligible_carrier, self.target_updates, self.quorum, self.plan.deadline)(
            orders, job
        )

    @cached_property
    def wire(self) -> Wire:
        """How leaves travel."""
        return build_wire(self.settings, self.start)

    @property
    def train(self) -> RemoteTraining:
        """A round's job."""
        return RemoteTraining(
            self.algorithm,
            self.terms,
            lambda: self.names,
            self.registry.weights,
            self._make_bounds,
            self._count_attempts,
            self._get_accepted_digests,
            self._record_event,
            self.wire,
            self.client_states,
        )

    def start(self) -> ServerState:
        """The server before the first round: as on one machine."""
        rng = generator(self.settings.federation.seed, "init")
        return self.algorithm.init(self.task.init(rng))

    def with_client_states(self, client_states: ClientStateStore) -> "Deployment":
        """The same, with what the server itself works out of what its sites remember.

        What else they keep is theirs.
        """
        return replace(self, client_states=client_states)

    def cohort(self, round_: int, losses: Tensor | None) -> list[int]:
        """Who is asked in a round: of those present, more than are wanted.

        The first round waits for all that it wants, a later one for its quorum; neither for ever.

        Raises:
            QuorumError: too few are there.
        """
        del losses
        gather_deadline = time.monotonic() + self.plan.gather
        needed_sites = self.target_updates if round_ == 0 else self.quorum
        while (
            len(present := self.find_ready_sites()) < needed_sites
            and time.monotonic() < gather_deadline
        ):
            time.sleep(POLL_SECONDS)
        if len(present) < self.quorum:
            raise QuorumError(
                f"round {round_ + 1} needs {self.quorum} sites, and {len(present)} are there: "
                f"{', '.join(present) or 'none'}"
            )
        cohort_size = math.ceil(self.plan.over_selection * self.target_updates)
        return sample_cohort(
            self.settings.federation.seed, round_, present, self.registry.numbers(), cohort_size
        )

    def validation(self, state: ServerState) -> dict[str, Any] | None:
        """Held-out sums of the sites that are there, together and site by site; none of nobody."""
        per_site = {
            name: said["validation"]
            for name, said in self.evaluate_sites(state, self.find_ready_sites()).items()
        }
        return sum_statistics(per_site) if per_site else None

    def evaluate_sites(
        self, state: ServerState, names: Sequence[str], *, backbone_only: bool = False
    ) -> dict[str, dict[str, Sums]]:
        """What sites say of their models: sums of validation data, after the last round of test.

        Args:
            state: of the global adapter.
            names: whom to ask.
            backbone_only: judge the backbone as it came instead.
        """
        empty_payloads = dict.fromkeys(names, b"")
        payloads = empty_payloads if backbone_only else self.encode_payloads(state.adapter, names)
        answers = self.ask("evaluate", state.round, payloads)
        parts = {"validation"} | ({"test"} if self._is_finished(state.round) else set())
        sums_per_site = {}
        for name, answer in answers:
            try:
                sums_per_site[name] = {
                    part: validate_sums(answer.said.get(part), self.count_names) for part in parts
                }
            except RefusedError as error:
                self.record_refusal(name, state.round, error)
        return {name: sums_per_site[name] for name in self.names if name in sums_per_site}

    def ask(
        self, kind: WorkKind, round_: int, payloads: Mapping[str, bytes]
    ) -> Iterator[tuple[str, Answer]]:
        """Have sites do other work than training; what is not as it must be is left out.

        Args:
            kind: of the work.
            round_: rounds that are committed.
            payloads: whom to ask, and the leaves that go with it.
        """
        accepted_digests, numbers = self._get_accepted_digests(round_), self.registry.numbers()
        work = {
            name: WorkRequest(
                kind, self.terms, numbers[name], round_, 0, accepted_digests.get(name), payload
            )
            for name, payload in payloads.items()
        }
        unanswered = set(payloads)
        # whoever joins has nothing to work on
        seconds = min(self.plan.gather, JOIN_SECONDS) if kind == "join" else self.plan.deadline
        with closing(self.eligible_carrier.exchange(work, seconds)) as replies:
            for reply in replies:
                if reply.failed is not None:
                    self._record_event("failed", why=reply.failed, site=reply.site, round=round_)
                    continue
                base = digest(payloads.get(reply.site, b""))
                try:
                    answer = read_answer(ExpectedReply(kind, self.terms, round_, 0, base), reply)
                except RefusedError as error:
                    self.record_refusal(reply.site, round_, error)
                    continue
                if reply.site in unanswered:  # else it has said so before
                    unanswered.remove(reply.site)
                    yield reply.site, answer

    def encode_payloads(self, adapter: Leaves, names: Sequence[str]) -> dict[str, bytes]:
        """The leaves that travel to each of these sites, encoded."""
        numbers, shared_leaves = self.registry.numbers(), self.algorithm.select_shared(adapter)
        ranks = {name: self.algorithm.get_rank(numbers[name]) for name in names}
        payload_per_rank = {
            rank: encode(truncate_rank(shared_leaves, rank)) for rank in {*ranks.values()}
        }
        return {name: payload_per_rank[rank] for name, rank in ranks.items()}

    def _is_finished(self, round_: int) -> bool:
        return round_ >= self.settings.federation.rounds

    def find_ready_sites(self) -> list[str]:
        """Sites that are there, may take part, and have joined; who has come (back) is asked to."""
        present = self.eligible_carrier.present()
        self.joined_sites.intersection_update(present)
        now = time.monotonic()
        invited = [
            name
            for name in present
            if name not in self.joined_sites
            and now - self.invitation_times.get(name, -math.inf) > REINVITE_SECONDS
        ]
        if invited:
            self.registry.enroll(invited)
            for name, answer in self.ask("join", 0, dict.fromkeys(invited, b"")):
                self._admit_site(name, answer)
            unanswered = [name for name in invited if name not in self.joined_sites]
            self.invitation_times.update(dict.fromkeys(unanswered, time.monotonic()))
        self.on_present(present)
        return [name for name in present if name in self.joined_sites]

    def _admit_site(self, name: str, answer: Answer) -> None:
        """Let a site in that says how much it has: as much as before, if it was in before."""
        try:
            previous_weight = self.registry.weights().get(name)
            weight, counts = validate_join(answer.said, self.plan.largest_weight, previous_weight)
        except RefusedError as error:
            self.record_refusal(name, 0, error)
            return
        self.registry.record_join(name, weight, counts)
        self.joined_sites.add(name)
        self.audit.write("joined", site=name)
        self.tell(f"{name} joined, with {weight} training examples")

    def record_refusal(self, name: str, round_: int, error: RefusedError) -> None:
        """Write down that a site's answer does not count."""
        self._record_event(
            get_event_name(error), why=str(error), site=name, round=round_, code=error.code
        )

    def list_eligible_sites(self) -> list[str]:
        """Sites that may take part now: neither revoked, nor left out for too many offences."""
        refusals = self.audit.get_refusals()
        return [name for name in self.members() if refusals[name] < self.plan.offences]

    def list_active_sites(self) -> list[str]:
        """Sites that have joined, and may take part still."""
        eligible = self.list_eligible_sites()
        return [name for name in self.registry.weights() if name in eligible]

    @property
    def count_names(self) -> tuple[str, ...]:
        """What an evaluation counts."""
        return ("count", "words") if self.task.measure.material == "text" else ("count",)

    def _record_event(self, event: str, *, why: str = "", **fields: str | int) -> None:
        """Write a line of the audit log, and say why; a site that declines may have lost its run.

        So it is asked to join again, before anything else.
        """
        if why:
            self.tell(f"{fields['site']}: {event}: {why}")
        if event == "declined":
            self.joined_sites.discard(str(fields["site"]))
        self.audit.write(event, **fields)

    def _make_bounds(self, round_: int) -> Bounds:
        training, first_round = self.settings.training, round_
        if self.wire.feedback:  # what earlier rounds left out may come with this one
            first_round = 0
        rates = (
            get_learning_rate(self.settings, self.algorithm, r)
            for r in range(first_round, round_ + 1)
        )
        is_bounded = not (self.wire.feedback and training.weight_decay)
        training = replace(training, clip=training.clip or self.plan.gradient or 0.0)
        return Bounds(
            self.plan.largest_weight,
            training,
            sum(rates),
            self.task.phases,
            self.plan.spectrum,
            1.0 if is_bounded else math.inf,
        )

    def _count_attempts(self, round_: int) -> int:
        return sum(
            line["event"] == "opened" and line["round"] == round_ for line in self.audit.lines
        )

    def _get_accepted_digests(self, committed: int) -> Mapping[str, str]:
        return {name: taken.payload for name, taken in self.audit.get_accepted(committed).items()}
