"""What a client does after the last round: tune a copy of what the rounds left, and keep it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fedgen_edge.algorithms.beside import mixed, unmixed
from fedgen_edge.client import Judge, Patience, Recipe, descend, personalise
from fedgen_edge.data.batches import Budget
from fedgen_edge.jobs import Clients, Tuned
from fedgen_edge.types import Leaves, Order


@dataclass(frozen=True)
class Personalise:
    """Each client's own tuning of the last global adapter."""

    clients: Clients
    budget: Budget
    recipe: Recipe
    patience: Patience
    mixing: tuple[float, ...] = ()
    """Shares of the tuned adapter to choose from, the rest being the shared one's; none is 1."""

    def steps(self, order: Order) -> int:
        """Most optimiser steps."""
        return self.clients.steps(order, self.budget)

    def kin(self, order: Order) -> int:
        """All may be together."""
        del order
        return 0

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[Tuned]:
        """Tune, and return every client's own adapter, which goes nowhere."""
        return replace(self, clients=self.clients.choosing(orders))._tuned(orders, stacked)

    def _tuned(self, orders: Sequence[Order], stacked: bool) -> list[Tuned]:
        clients, judge = self.clients, self._judge(orders)
        given = clients.together(orders, self.budget, "personalise", stacked=stacked, own=True)
        start, memory, batches = given
        walk = descend(clients.task, start, memory, batches, self.recipe)
        starts = [clients.place(clients.own(order)) for order in orders]
        found = personalise(walk, starts, judge, self.patience)
        tuned = [
            Tuned(order, {k: v.cpu() for k, v in best.items()}, history, chosen,
                  cluster=clients.choice(order))
            for order, (best, history, chosen) in zip(orders, found, strict=True)
        ]  # fmt: skip
        return [self._mixed(one, partial(judge, at)) for at, one in enumerate(tuned)]

    def _mixed(self, tuned: Tuned, judge: Callable[[Leaves], float]) -> Tuned:
        """The mixture with what is shared that the client's validation data like best."""
        if not self.mixing:
            return tuned
        shared, beside = self.clients.start(tuned.order), self.clients.algorithm.beside
        own = unmixed(tuned.adapter, shared, beside.share if beside else 1.0)
        shares = sorted({*self.mixing, 1.0}, reverse=True)
        losses = {s: judge(self.clients.place(mixed(own, shared, s))) for s in shares}
        share = min(shares, key=losses.__getitem__)
        return tuned._replace(adapter=mixed(own, shared, share), share=share)

    def _judge(self, orders: Sequence[Order]) -> Judge:
        clients, task = self.clients, self.clients.task
        each = [clients.shards[order.clients[0]].validation for order in orders]
        each = clients.ahead(each) or each

        def judge(place: int, own: Leaves) -> float:
            return float(task.summary(task.evaluate(own, clients.place(each[place])))["loss"])

        return judge
