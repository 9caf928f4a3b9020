"""Whole rounds against answers from outside: by hand, and a plain PEFT loop."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import SGD, AdamW, Optimizer
from transformers import AutoModelForCausalLM

from conftest import Line, line_shard, sentences
from fedgen_edge.adapters.peft_io import from_peft
from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.algorithms.merge import weigh_by_agreement
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Federation, Method, from_table
from fedgen_edge.data.batches import Budget, Shard, make_batches, pack
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.engines.stacked import make_stacked_engine
from fedgen_edge.federation.client import Recipe
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.rounds import Engine, rounds, sample_clients
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Commit, Leaves, Order, ServerState, Update

HALF = partial(SGD, lr=0.5)


def run_line(
    shards: list[Shard], algorithm: Algorithm, count: int = 1, engine: Engine = run_serially
) -> tuple[Commit, dict[int, Leaves]]:
    """Full-batch rounds on a Line from w = 0, every client in each."""
    memory: dict[int, Leaves] = {}
    clients = Clients(Line(), algorithm, shards, 0, memory=memory)
    job = Train(clients, Budget(99), lambda _: Recipe(HALF))
    plan = Federation(clients=len(shards), rounds=count)
    start = algorithm.init({"w": torch.tensor(0.0)})
    *_, last = rounds(start, algorithm, engine, job, plan)
    return last, memory


def test_fedavg_weighs_clients_by_their_examples() -> None:
    # one step goes half of the way to a client's mean: 4/2 = 2 with one example, 8/2 = 4 with
    # three; (1 * 2 + 3 * 4) / 4 = 3.5, not 3. Then w = 3.5: halfway to 4 and 8 is 3.75 and 5.75,
    # (3.75 + 3 * 5.75) / 4 = 5.25.
    shards = [line_shard("a", 4), line_shard("b", 8, 8, 8)]
    assert float(run_line(shards, Algorithm())[0].state.adapter["w"]) == 3.5
    assert float(run_line(shards, Algorithm(), 2)[0].state.adapter["w"]) == 5.25


def test_one_client_and_equal_clients_are_the_identity() -> None:
    # halfway to 4, twice: 3.
    for shards in ([line_shard("a", 4)], [line_shard(n, 4) for n in "abc"]):
        assert float(run_line(shards, Algorithm(), 2)[0].state.adapter["w"]) == 3.0


def test_local_only_shares_nothing_and_remembers() -> None:
    # each goes on from its own: 2 then 3 towards 4; 4 then 6 towards 8.
    shards = [line_shard("a", 4), line_shard("b", 8)]
    last, memory = run_line(shards, METHODS["local-only"].make(Method()), 2)
    assert float(last.state.adapter["w"]) == 0.0
    assert [float(memory[c]["kept:w"]) for c in (0, 1)] == [3.0, 6.0]
    assert all(u.bytes_up == 0 for u in last.updates)
    assert last.bytes_down == 0


def test_centralised_meets_every_clients_batches_in_turn() -> None:
    # one learner, two steps: to 4/2 = 2, then halfway to 8: 5.
    shards = [line_shard("a", 4), line_shard("b", 8)]
    last, _ = run_line(shards, METHODS["centralised"].make(Method()))
    assert float(last.state.adapter["w"]) == 5.0
    assert len(last.updates) == 1


def test_fedper_keeps_the_last_layers_at_the_client() -> None:
    sends = METHODS["fedper"].make(Method(personal_layers=1)).sends
    names = ["m.layers.0.q.lora_A", "m.layers.9.q.lora_A", "m.layers.10.q.lora_A", "embed.lora_A"]
    assert sends(names, None) == {"m.layers.0.q.lora_A", "m.layers.9.q.lora_A", "embed.lora_A"}
    assert sends(sorted(names), None) == sends(
        names, None
    )  # the server's names come in another order


def test_a_cohort_is_drawn_without_replacement_by_seed_and_round() -> None:
    plan = Federation(clients=10, cohort=4, rounds=1, unseen_clients=2, seed=3)
    drawn = [sample_clients(plan, 10, r) for r in range(200)]
    assert all(len(set(cohort)) == 4 and max(cohort) < 8 for cohort in drawn)
    assert drawn[0] == sample_clients(plan, 10, 0)
    # 200 rounds x 4 of 8: each client 100 times, standard deviation sqrt(200/4) = 7.1
    assert all(70 < sum(c in cohort for cohort in drawn) < 130 for c in range(8))


OPTIMISERS: dict[str, partial[Optimizer]] = {
    "sgd": partial(SGD, lr=0.05),
    "adamw": partial(AdamW, lr=1e-3, weight_decay=0.01),
}
SIZES = (11, 5, 2)


def build(backbone: str) -> tuple[Language, list[Shard]]:
    settings = from_table({"backbone": {"path": backbone, "precision": "float32"}})
    task = language.build(settings, full=False, device=torch.device("cpu"))

    def shard(client: int, size: int) -> Shard:
        texts = sentences(size, client)
        examples = pack(task.encode(texts), [1] * size, 24)
        return Shard(str(client), examples, examples, examples)

    return task, [shard(c, size) for c, size in enumerate(SIZES)]


def plain_peft(
    task: Language, shards: list[Shard], optimiser: Any, clip: float, count: int
) -> Leaves:
    """What users write: get_peft_model, transformers' loss, torch.optim, and a mean by hand."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(task.model.folder),
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = {from_peft(n.replace(".default", "")): p for n, p in trained.items()}
    server = task.init(generator(0, "init"))
    weights = [float(len(s.train["words"])) for s in shards]
    for r in range(count):
        sums = {k: torch.zeros_like(v) for k, v in server.items()}
        for c, shard in enumerate(shards):
            with torch.no_grad():
                for name, parameter in ours.items():
                    parameter.copy_(server[name])
            descent = optimiser(list(ours.values()))
            for batch in make_batches(shard.train, Budget(2, epochs=2), 0, "train", r, c):
                same = batch["segment"].unsqueeze(2) == batch["segment"].unsqueeze(1)
                seen = (same & torch.ones(24, 24).tril().bool()).unsqueeze(1)
                logits = model(
                    input_ids=batch["tokens"],
                    position_ids=batch["position"],
                    attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min),
                ).logits
                labels = torch.where(batch["mask"], batch["labels"], -100).long()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
                descent.zero_grad()
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(list(ours.values()), clip)
                descent.step()
            for name, parameter in ours.items():
                sums[name] += parameter.detach() * weights[c]
        server = {k: v / sum(weights) for k, v in sums.items()}
    return server


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_serial_stacked_and_a_plain_peft_loop_agree(backbone: str, name: str, clip: float) -> None:
    task, shards = build(backbone)
    algorithm, optimiser = Algorithm(), OPTIMISERS[name]
    job = Train(
        Clients(task, algorithm, shards, 0), Budget(2, epochs=2), lambda _: Recipe(optimiser, clip)
    )

    def result(engine: Engine) -> Leaves:
        start = ServerState(0, task.init(generator(0, "init")))
        plan = Federation(clients=3, rounds=3)
        *_, last = rounds(start, algorithm, engine, job, plan)
        return last.state.adapter

    expected = plain_peft(task, shards, optimiser, clip, 3)
    change = task.init(generator(0, "init"))
    assert max(float((expected[k] - change[k]).abs().max()) for k in expected) > 1e-3
    for engine in (run_serially, make_stacked_engine(3), make_stacked_engine(2)):
        found = result(engine)
        for leaf in expected:
            torch.testing.assert_close(found[leaf], expected[leaf], atol=1e-5, rtol=0)


def test_of_the_candidates_those_of_the_highest_loss_are_chosen() -> None:
    plan = Federation(clients=6, cohort=2, rounds=1, power_of_choice=4, seed=1)
    candidates = sample_clients(replace(plan, cohort=4, power_of_choice=None), 6, 0)
    losses = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7, 0.2])
    expected = sorted(sorted(candidates, key=lambda c: -float(losses[c]))[:2])
    assert sample_clients(plan, 6, 0, losses) == expected
    # who never trained comes first, and without losses the draw is the plain one
    losses[candidates[0]] = torch.inf
    assert candidates[0] in sample_clients(plan, 6, 0, losses)
    assert sample_clients(plan, 6, 0) == sample_clients(replace(plan, power_of_choice=None), 6, 0)


def test_the_server_remembers_each_clients_last_loss() -> None:
    shards = [line_shard(str(value), value) for value in (1.0, 2.0, 5.0)]
    job = Train(
        Clients(Line(), Algorithm(), shards, 0), Budget(1), lambda _: Recipe(partial(SGD, lr=0.5))
    )
    plan = Federation(clients=3, cohort=1, rounds=4, power_of_choice=3)
    cohorts = []
    for done in rounds(
        Algorithm().init(Line().init(generator(0))), Algorithm(), run_serially, job, plan
    ):
        cohorts.append(done.updates[0].order.clients[0])
    # each once while its loss is unknown; then the one whose loss was highest, (5 - w)^2 / 2
    assert sorted(cohorts[:3]) == [0, 1, 2]
    losses = done.state.losses
    assert losses is not None
    assert float(losses[cohorts[3]]) == done.updates[0].loss
    assert cohorts[3] == 2


def test_layers_weigh_clients_by_how_well_they_agree() -> None:
    # layer x: (1, 0), (1, 0) and (-1, 0) of weights 2, 2 and 3, so their mean is (1/7, 0), and the
    # cosines with it are 1, 1 and -1: (1, 0)
    # layer y: (1, 0), (0, 1) and (0, 0), mean (2/7, 2/7), cosines 1/sqrt 2 twice and 0: (1/2, 1/2)
    changes = [((1.0, 0.0), (1.0, 0.0)), ((1.0, 0.0), (0.0, 1.0)), ((-1.0, 0.0), (0.0, 0.0))]
    order = Order((0,), 0, {})
    updates = [
        Update(order, {"x.w": torch.tensor(x), "y.w": torch.tensor(y)}, {}, weight, 0.0, 1, 0)
        for (x, y), weight in zip(changes, (2.0, 2.0, 3.0), strict=True)
    ]
    found = weigh_by_agreement({}, updates)
    torch.testing.assert_close(found["x.w"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found["y.w"], torch.tensor([0.5, 0.5]))
    # a moving average is weighed as what it follows, wherever it points itself
    both = [
        replace(u, delta={**u.delta, "average.x.w": torch.tensor([0.0, float(at)])})
        for at, u in enumerate(updates)
    ]
    torch.testing.assert_close(
        weigh_by_agreement({}, both)["average.x.w"], torch.tensor([0.0, 0.5])
    )
    # where all agree it is FedAvg's mean
    same = [replace(u, delta={"x.w": torch.tensor([2.0, 1.0])}) for u in updates]
    torch.testing.assert_close(weigh_by_agreement({}, same)["x.w"], torch.tensor([2.0, 1.0]))
