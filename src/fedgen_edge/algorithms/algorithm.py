"""An algorithm is its slots; each slot's default is FedAvg, so a method fills one to three."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedgen_edge.algorithms import (
    local_corrections,
    merge,
    server_optimizers,
    share,
    staleness,
)
from fedgen_edge.algorithms.ifca import Clusters
from fedgen_edge.algorithms.merge_products import make_residuals
from fedgen_edge.algorithms.personal_models import PersonalModel
from fedgen_edge.types import RESIDUAL, VARIATE, Leaves, Order, ServerState, Update

Trains = Callable[[str, int, int], bool]
"""Whether a leaf is trained, from its name, the round and the client's epoch."""
Sends = Callable[[Sequence[str], int | None], set[str]]
"""Which leaves a client sends in a round, of all names; without a round: in any."""
Receives = Callable[[Leaves, Leaves], Leaves]
"""What a client begins from: the global adapter and its own memory."""
Corrects = Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]
"""The gradients to use, from the gradients, the leaves now, at the start, and the memory."""
Tells = Callable[[ServerState, int], Leaves]
"""What travels down beside the adapter to be trained with, from the number of clients."""
Learns = Callable[[Order, Leaves, int, Leaves], Leaves]
"""What a client remembers of an order beside leaves: from its change, its steps and its memory."""
Merges = Callable[[Leaves, Sequence[Update]], Leaves]
"""The cohort's updates as one change of the server's adapter."""
Steps = Callable[[ServerState, Leaves], ServerState]
"""The server's state after a change."""
Groups = Callable[[Sequence[int]], list[tuple[int, ...]]]
"""Whose data train together, of a cohort."""
Ages = Callable[[int], float]
"""What a change counts of itself, from the commits since the version that it began from."""


LOCAL_PREFIX = "kept:"
"""Prefix, in a client's memory, of leaves that it never sends."""


def restore_local(adapter: Leaves, memory: Leaves) -> Leaves:
    """The global adapter, with the leaves that the client has kept in their place."""
    local_leaves = {
        k.removeprefix(LOCAL_PREFIX): v for k, v in memory.items() if k.startswith(LOCAL_PREFIX)
    }
    return {**adapter, **local_leaves}


def broadcast_nothing(_state: ServerState, _among: int) -> Leaves:
    """The adapter travels alone."""
    return {}


def remember_nothing(_order: Order, _delta: Leaves, _steps: int, _memory: Leaves) -> Leaves:
    """Clients remember leaves alone."""
    return {}


@dataclass(frozen=True)
class Algorithm:
    """What a method changes of FedAvg; it knows no engine, task or file."""

    begins: Callable[[Leaves], Leaves] = share.keep_adapter
    """What the server begins with, from the task's adapter."""
    surveys: Callable[[int], bool] = share.never_survey
    """Whether clients send gradients in a round, and train nothing."""
    trains: Trains = share.train_all
    sends: Sends = share.share_all
    """All that is sent in any round travels to the clients in each."""
    receives: Receives = restore_local
    corrects: Corrects = local_corrections.keep_gradients
    tells: Tells = broadcast_nothing
    learns: Learns = remember_nothing
    merges: Merges = merge.weighted_average
    summed: merge.PartialAggregation | None = None
    """How workers may sum for a rule of its own; none is not at all."""
    steps: Steps = server_optimizers.add
    groups: Groups = share.separate_clients
    adapts: Literal["lora", "full"] = "lora"
    """Whether leaves are an adapter's or the whole model's."""
    residual: int = 0
    """Rank of a frozen pair beside each trained one, which the server alone changes; 0 is none."""
    ranks: tuple[int, ...] = ()
    """Ranks of adapters, which clients take in turn; none is the global adapter's for all."""
    head_epochs: int = 0
    """First epochs of a round, which train what stays at the client, and the others what is shared;
    0 trains both throughout."""
    beside: PersonalModel | None = None
    """A client's own model, which it trains beside the shared one; none has but that."""
    clusters: Clusters | None = None
    """The server's adapters, where clients choose from several; none has one for all."""
    buffer: int = 0
    """Updates that make a commit, whichever come first; 0 waits for the round's cohort."""
    ages: Ages = staleness.ignore_staleness

    @property
    def pools_data(self) -> bool:
        """Whether clients' data train together, so that nothing is sent."""
        return self.groups is not share.separate_clients

    @property
    def partial_aggregation(self) -> merge.PartialAggregation | None:
        """How one change may stand for those of many clients; none where the server needs each."""
        if self.buffer:
            return None
        return merge.PartialAggregation() if self.merges is merge.weighted_average else self.summed

    def init(self, adapter: Leaves) -> ServerState:
        """The server before the first round; leaves by name, as decoding gives them."""
        adapter = self.begins(adapter)
        residual_leaves = make_residuals(adapter, self.residual) if self.residual else {}
        return ServerState(round=0, adapter=dict(sorted({**adapter, **residual_leaves}.items())))

    def get_rank(self, client: int) -> int | None:
        """Of a client's adapter; none is the global adapter's."""
        return self.ranks[client % len(self.ranks)] if self.ranks else None

    def select_shared(self, leaves: Leaves, round_: int | None = None) -> Leaves:
        """Of these leaves, those that a client sends in a round; without one, those it receives."""
        names = self.sends(list(leaves), round_)
        frozen = () if round_ is None else (RESIDUAL, VARIATE)
        return {k: v for k, v in leaves.items() if k in names and not k.startswith(frozen)}

    def make_trained_filter(self, names: Sequence[str], round_: int) -> Callable[[str, int], bool]:
        """Whether one of these leaves is trained in an epoch of the round."""
        shared = self.sends(names, None) if self.head_epochs else set()

        def is_trained(name: str, epoch: int) -> bool:
            in_phase = not self.head_epochs or (name in shared) == (epoch >= self.head_epochs)
            return in_phase and self.trains(name, round_, epoch)

        return is_trained

    def get_personal_model(self, shared: Leaves, memory: Leaves) -> Leaves:
        """A client's own model as the rounds left it: the shared one where there is no other.

        Args:
            shared: what the client begins from with the shared one.
            memory: the client's.
        """
        return self.beside.make_start(shared, memory) if self.beside else shared

    def make_broadcast(self, state: ServerState, num_clients: int) -> Leaves:
        """What clients receive to train with, of so many that there are."""
        return {**self.select_shared(state.adapter), **self.tells(state, num_clients)}

    def step(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """The server after one more round: merge what was sent, then step.

        A cohort that sends nothing leaves the adapter as it is.
        """
        if self.buffer:
            updates = [
                staleness.discount_update(u, self.ages(state.round - u.order.round))
                for u in updates
            ]
        merged = self.merges(state.adapter, updates) if any(u.delta for u in updates) else {}
        new_state = self.steps(state, merged)
        return replace(new_state, round=state.round + 1)

    def keeps(self, start: Leaves, delta: Leaves, memory: Leaves) -> Leaves:
        """A client's memory after a round: what it had, and what it trained and never sends."""
        shared = self.select_shared(delta)
        local_leaves = {k: start[k] + v for k, v in delta.items() if k not in shared and v.any()}
        return {**memory, **{LOCAL_PREFIX + k: v for k, v in local_leaves.items()}}
