"""Mistakes that published code makes, and the test that would fail if this code made them.

The numbers are those of the list that the project keeps of them. A mistake that no other test holds
has its own here; it was made on purpose once, to see that test fail.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from conftest import Line, line_shard
from fedgen_edge.adapters.lora import inject, merge
from fedgen_edge.algorithms import merge_products
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Adapter, Federation, Method
from fedgen_edge.data.batches import Budget
from fedgen_edge.engines.serial import run_serially
from fedgen_edge.federation.client import Recipe
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.rounds import rounds, sample_clients
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Order, ServerState, Update

TESTS = Path(__file__).parents[1]

HELD: dict[str, tuple[str, ...]] = {
    # 1: of all clients, the first alone counts, times its share
    "1": (
        "federation/test_federation.py::test_fedavg_weighs_clients_by_their_examples",
        "contracts/test_laws.py::test_what_is_declared_holds",
    ),
    # 2: server and clients scale by different alphas; weights are put into a model that has no
    # adapter; the rank is found by a dimension that equals it; it grows with the clients that are
    # there
    "2": (
        "adapters/test_ranks.py::test_peft_computes_with_a_clients_folder_what_the_client_did",
        "adapters/test_peft_io.py::test_peft_loads_a_folder_written_here_and_gives_the_same_logits",
        "adapters/test_ranks.py::test_a_rank_is_found_by_name_where_another_side_has_the_same_size",
        "algorithms/test_mistakes.py::test_a_frozen_pair_is_no_wider_for_more_clients",
    ),
    # 3: a residual is transposed where the layer is not, which a square one takes without a word
    "3": (
        "algorithms/test_merge_products.py::test_a_square_residual_is_not_transposed",
        "algorithms/test_mistakes.py::test_a_square_residual_lies_as_its_layers_weight_does",
    ),
    # 4: FFA freezes A before there is one, so A is trained and then thrown away
    "4": ("contracts/test_contracts.py::test_it_trains_and_counts_what_it_sends",),
    # 5: clients of unequal sizes count alike
    "5": (
        "algorithms/test_merge_products.py::test_the_residual_is_the_covariance_weighed_by_examples",
        "federation/test_federation.py::test_fedavg_weighs_clients_by_their_examples",
    ),
    # 6: one alpha for all ranks, so that scales differ, and products are averaged without them
    "6": (
        "algorithms/test_toy.py::test_one_alpha_for_unequal_ranks_misses_62_percent_and_one_scale_nothing",
        "adapters/test_ranks.py::test_peft_computes_with_a_clients_folder_what_the_client_did",
    ),
    # 7a: folding and export leave alpha / rank out
    "7a": (
        "adapters/test_lora.py::test_the_scale_is_applied_once",
        "adapters/test_lora.py::test_merged_equals_unmerged",
        "adapters/test_peft_io.py::test_the_other_scale_is_in_b_alone",
    ),
    # 7b: the server replaces what it has by a mean of fresh adapters, and forgets the round before
    "7b": (
        "federation/test_federation.py::test_fedavg_weighs_clients_by_their_examples",
        "algorithms/test_merge_products_dense.py::test_three_rounds_stay_exact_while_the_cap_suffices",
    ),
    # 7c: adapters travel without the configuration that it takes to load them
    "7c": (
        "adapters/test_peft_io.py::test_a_configuration_that_is_none_is_refused",
        "adapters/test_peft_io.py::test_peft_loads_a_folder_written_here_and_gives_the_same_logits",
    ),
    # 7d: clients begin every round from the backbone
    "7d": ("federation/test_federation.py::test_serial_stacked_and_a_plain_peft_loop_agree",),
    # 7e: a simulation averages random matrices, and nobody trains
    "7e": ("federation/test_federation.py::test_serial_stacked_and_a_plain_peft_loop_agree",),
    # 7g: of n clients no z-score passes (n - 1) / sqrt(n), 2.85 of ten, so one of 3 refuses nobody;
    # here each message is judged on its own, among three
    "7g": ("network/test_remote.py::test_an_attack_leaves_the_model_as_silence_would",),
    # 8: a misspelt name makes a method unreachable; squares are of the momentum and not of the
    # change; every seed draws the same cohorts; SCAFFOLD takes AdamW's steps for gradients; the
    # tenth client takes the place of another
    "8": (
        "algorithms/test_server_optimizers.py::test_adagrad_by_hand",
        "algorithms/test_server_optimizers.py::test_adam_by_hand",
        "algorithms/test_server_optimizers.py::test_adaptive_steps_are_flowers_but_for_their_start_and_adams_correction",
        "algorithms/test_mistakes.py::test_another_seed_draws_other_cohorts",
        "algorithms/test_scaffold.py::test_only_plain_sgd_will_do",
        "algorithms/test_mistakes.py::test_more_than_ten_clients_keep_what_is_theirs",
    ),
    # 9: the function that evaluates is empty (an assertion of a tuple, which is always true, is for
    # the linter)
    "9": ("contracts/test_contracts.py::test_evaluation_adds_up_and_sums_up",),
    # 10: alpha and the largest rank are numbers in the code; an SVD takes each layer's dense matrix
    "10": (
        "adapters/test_lora.py::test_the_scale_is_applied_once",
        "algorithms/test_mistakes.py::test_no_method_forms_a_layers_dense_update",
    ),
    # 11: the model is run twice for each query, to find how two adapters are to be mixed
    "11": (
        "adapters/test_mixed.py::test_peft_loads_a_mixture_and_it_is_read_back",
        "runs/test_personal.py::test_a_mixture_is_judged_saved_and_loaded_as_one_adapter",
    ),
    # 12: the server needs the backbone to merge; the first client's configuration counts for all
    "12": (
        "algorithms/test_mistakes.py::test_merging_needs_no_library_of_models",
        "algorithms/test_merge_mixed_ranks.py::test_means_over_holders_are_means_row_by_row",
    ),
    # 13: the backbone is loaded anew for each client; nothing is evaluated on the way (that the
    # learning rate goes by rounds is so here too, on purpose: `config.learning_rate`)
    "13": (
        "adapters/test_lora.py::test_the_backbones_weights_are_shared_frozen_and_never_copied",
        "report/test_summary.py::test_validation_is_nats_per_token_where_a_round_was_judged",
    ),
    # 14: a comment counts rounds from 1 where the code counts from 0
    "14": ("algorithms/test_share.py::test_rolora_sends_one_factor_a_round_and_receives_both",),
    # 15: real pictures are repeated until they are as many as the samples
    "15": (
        "runs/test_judge.py::test_the_numbers_are_those_of_the_samples_of_every_clients_own_model",
    ),
    # 16: a page tells numbers that the records do not
    "16": (
        "test_docs.py::test_pages_quote_what_the_records_say",
        "test_docs.py::test_no_measured_number_of_a_finding_is_typed_by_hand",
    ),
}
"""By a mistake's number, the tests that hold it."""

ABSENT = {
    "7f": "differential privacy is not here",
    "7h": "there is no filter that weights could be lost in: a message is taken or refused whole",
}
"""Mistakes in what this code does not do."""


def test_every_mistake_has_its_tests_or_a_reason() -> None:
    plain = [str(n) for n in range(1, 17) if n != 7]
    assert {*HELD} | {*ABSENT} == {*plain, *(f"7{letter}" for letter in "abcdefgh")}
    assert not {*HELD} & {*ABSENT}
    for name in (name for names in HELD.values() for name in names):
        file, _, test = name.partition("::")
        assert re.search(rf"^ *def {test}\(", (TESTS / file).read_text("utf-8"), re.MULTILINE), name


# --- clients of one layer, which say what they have moved


def cohort(state: ServerState, moved: Sequence[Mapping[str, Tensor]]) -> list[Update]:
    """Clients that received the server's adapter, and moved so."""
    return [
        Update(Order((i,), state.round, state.adapter), {**own}, {}, 1.0, 0.0, 1, 0)
        for i, own in enumerate(moved)
    ]


def random(like: Leaves, *key: object) -> Leaves:
    rng = generator("mistakes", *map(str, key))
    return {k: torch.randn(v.shape, generator=rng) for k, v in like.items()}


PAIR = {"q.lora_A": torch.ones(2, 9), "q.lora_B": torch.zeros(7, 2)}


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
def test_a_frozen_pair_is_no_wider_for_more_clients(name: str) -> None:
    algorithm = METHODS[name].make(Method(residual_rank=3))
    state = algorithm.init(PAIR)
    expected = {k: v.shape for k, v in state.adapter.items()}
    for clients in (1, 4, 2):
        moved = [random(PAIR, clients, i) for i in range(clients)]
        state = algorithm.step(state, cohort(state, moved))
        assert {k: v.shape for k, v in state.adapter.items()} == expected


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
@pytest.mark.parametrize("layer", [nn.Linear(2, 2, bias=False), Conv1D(2, 2)])
def test_a_square_residual_lies_as_its_layers_weight_does(name: str, layer: nn.Module) -> None:
    # one client's product takes the second input to the first output, and the other one's is zero:
    # half of 5 arrives, times alpha / rank = 2
    nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]
    model = nn.ModuleDict({"q": layer})
    lora = inject(model, Adapter(rank=1, alpha=2.0, target_modules=("q",)))
    algorithm = METHODS[name].make(Method())
    state = algorithm.init({"q.lora_A": torch.zeros(1, 2), "q.lora_B": torch.zeros(2, 1)})
    one = {"q.lora_A": torch.tensor([[0.0, 1.0]]), "q.lora_B": torch.tensor([[1.0], [0.0]])}
    updates = cohort(state, [one, {k: 0 * v for k, v in one.items()}])
    merge(model, lora, algorithm.step(state, updates).adapter)
    torch.testing.assert_close(model["q"](torch.tensor([[3.0, 5.0]])), torch.tensor([[5.0, 0.0]]))


# --- rounds


def test_another_seed_draws_other_cohorts() -> None:
    drawn = {
        tuple(
            tuple(sample_clients(Federation(clients=10, cohort=3, seed=seed), 10, r))
            for r in range(4)
        )
        for seed in range(20)
    }
    assert len(drawn) == 20


def test_more_than_ten_clients_keep_what_is_theirs() -> None:
    # half of the way from 0 to its own number, for each of twelve
    memory: dict[int, Leaves] = {}
    algorithm = METHODS["local-only"].make(Method())
    shards = [line_shard(f"client {n}", float(n)) for n in range(12)]
    clients = Clients(Line(), algorithm, shards, 0, memory=memory)
    job = Train(clients, Budget(9), lambda _: Recipe(partial(SGD, lr=0.5)))
    start = algorithm.init({"w": torch.tensor(0.0)})
    list(rounds(start, algorithm, run_serially, job, Federation(clients=12, cohort=12, rounds=1)))
    kept = {client: float(own["kept:w"]) for client, own in memory.items() if own}
    assert kept == {n: n / 2 for n in range(1, 12)}  # who did not move has nothing to keep


# --- what merging costs


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made within it."""

    size = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.size = max([self.size, *sizes])
        return made


@pytest.mark.parametrize("name", METHODS)
def test_no_method_forms_a_layers_dense_update(name: str) -> None:
    # 300 x 300 is 90 000 values; ranks of three clients, the server and a residual side by side are
    # 4 * 2 + 4 columns of 300, in two factors
    algorithm = METHODS[name].make(Method(residual_rank=4))
    like = {f"layers.{i}.lora_A": torch.ones(2, 300) for i in (0, 1)}
    state = algorithm.init(random(like | {k[:-1] + "B": v.T for k, v in like.items()}))
    with Largest() as largest:
        for r in range(3):
            moved = [random(state.adapter, r, i) for i in range(3)]
            trained = [{k: v for k, v in own.items() if algorithm.trains(k, r, 0)} for own in moved]
            updates = cohort(state, [algorithm.select_shared(own, r) for own in trained])
            told = algorithm.make_broadcast(state, 3)
            order = replace(updates[0].order, received=told, strides={"": 1.0})
            state = algorithm.step(state, [replace(u, order=order) for u in updates])
            merge_products.measure_errors(updates, state.adapter)
            merge_products.measure_sizes(state.adapter)
    assert largest.size <= 2 * 300 * 12


def test_merging_needs_no_library_of_models() -> None:
    told = (
        "import sys, fedgen_edge.algorithms.methods; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'peft', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
