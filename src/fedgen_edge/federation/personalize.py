"""What a client does after the last round: tune a copy of what the rounds left, and keep it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fedgen_edge.algorithms.personal_models import mix_adapters, unmix_adapters
from fedgen_edge.data.batches import Budget
from fedgen_edge.federation.client import Patience, Recipe, ValidationLoss, descend, personalize
from fedgen_edge.federation.jobs import Clients, TuningResult
from fedgen_edge.types import Leaves, Order


@dataclass(frozen=True)
class Personalize:
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

    def get_stack_group(self, order: Order) -> int:
        """All may be together."""
        del order
        return 0

    def __call__(self, orders: Sequence[Order], *, stacked: bool) -> list[TuningResult]:
        """Tune, and return every client's own adapter, which goes nowhere."""
        return replace(self, clients=self.clients.choose_clusters(orders))._tune(orders, stacked)

    def _tune(self, orders: Sequence[Order], stacked: bool) -> list[TuningResult]:
        clients, validate = self.clients, self._make_validation(orders)
        inputs = clients.prepare_inputs(
            orders, self.budget, "personalise", stacked=stacked, personal=True
        )
        start, memory, batches = inputs
        training_steps = descend(clients.task, start, memory, batches, self.recipe)
        starts = [clients.to_device(clients.personal_start(order)) for order in orders]
        outcomes = personalize(training_steps, starts, validate, self.patience)
        tuned = [
            TuningResult(order, {k: v.cpu() for k, v in best.items()}, history, chosen,
                  cluster=clients.get_cluster(order))
            for order, (best, history, chosen) in zip(orders, outcomes, strict=True)
        ]  # fmt: skip
        return [self._mix(one, partial(validate, at)) for at, one in enumerate(tuned)]

    def _mix(self, tuned: TuningResult, validate: Callable[[Leaves], float]) -> TuningResult:
        """The mixture with what is shared that the client's validation data like best."""
        if not self.mixing:
            return tuned
        shared, beside = self.clients.start(tuned.order), self.clients.algorithm.beside
        personal = unmix_adapters(tuned.adapter, shared, beside.share if beside else 1.0)
        shares = sorted({*self.mixing, 1.0}, reverse=True)
        losses = {
            s: validate(self.clients.to_device(mix_adapters(personal, shared, s))) for s in shares
        }
        share = min(shares, key=losses.__getitem__)
        return tuned._replace(adapter=mix_adapters(personal, shared, share), share=share)

    def _make_validation(self, orders: Sequence[Order]) -> ValidationLoss:
        clients, task = self.clients, self.clients.task
        validation_sets = [clients.shards[order.clients[0]].validation for order in orders]
        validation_sets = clients.precompute(validation_sets) or validation_sets

        def validate(place: int, adapter: Leaves) -> float:
            return float(
                task.summary(task.evaluate(adapter, clients.to_device(validation_sets[place])))[
                    "loss"
                ]
            )

        return validate
