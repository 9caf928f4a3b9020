"""Blocks of layers below the lowest adapted one are passed over: the same numbers, less work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from transformers import FalconConfig, FalconForCausalLM

from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Adapter, Method, from_table
from fedgen_edge.data.batches import Budget, Shard, pack, stack_examples
from fedgen_edge.federation.client import Patience, Recipe
from fedgen_edge.federation.jobs import Clients, Train
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.leaves import stack
from fedgen_edge.runs.build import build
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.config_only import build_from_config, make_config
from fedgen_edge.tasks.language.loss import TokenLoss
from fedgen_edge.tasks.language.prefix_cache import NO_PREFIX_CACHE, STATES, make_prefix_cache
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Batch, Leaves, Order

LENGTH = 16
LLAMA = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "head_dim": 8,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (LLAMA, r"model\.layers\.2\..*_proj"),
    "gpt2": ({"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 50}, r".*\.h\.[12]\..*c_attn"),
    "gemma2": (LLAMA, r"model\.layers\.2\..*_proj"),  # scaled embeddings, two kinds of layers
    "qwen3": (LLAMA, r"model\.layers\.[12]\..*[qv]_proj"),
}


def outline(kind: str, **adapter: Any) -> Language:
    shape, targets = MODELS[kind]
    told = Adapter(**{"rank": 2, "target_modules": (targets,), "dropout": 0.5} | adapter)
    torch.manual_seed(0)
    task = build_from_config(make_config({"model_type": kind, **shape}), told, torch.float32)
    return replace(
        task, length=LENGTH, prefix_cache=make_prefix_cache(task.module, task.model.leaf_shapes())
    )


@pytest.fixture(scope="module")
def task() -> Language:
    return make("model.layers.1.*_proj")


def make(targets: str, *, full: bool = False) -> Language:
    table = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"target_modules": [targets], "dropout": 0.5},
        "data": {"length": LENGTH},
    }
    return language.build(from_table(table), full=full, device=torch.device("cpu"))


def examples(count: int, key: int, vocabulary: int = 50) -> Batch:
    rng = generator("text", key)
    texts = [torch.randint(vocabulary, (9,), generator=rng).tolist() for _ in range(2 * count)]
    return pack(texts, [8] * len(texts), LENGTH)


def some(task: Language, key: int) -> Leaves:
    rng = generator("some", key)
    return {k: torch.randn(v.shape, generator=rng) * 0.3 for k, v in task.init(rng).items()}


def ahead(task: Language, held: Batch) -> Batch:
    done = task.precompute([held])
    assert done is not None
    return done[0]


def slopes(task: Language, adapter: Leaves, batch: Batch) -> tuple[torch.Tensor, ...]:
    own = {k: v.clone().requires_grad_() for k, v in adapter.items()}
    loss = task.loss(own, batch, "").total
    return loss, *torch.autograd.grad(loss.sum(), [*own.values()])


@contextmanager
def counted(task: Language) -> Iterator[list[int]]:
    """How many blocks of text each block of layers has computed."""
    blocks = [*task.prefix_cache.below, *task.prefix_cache.above]
    seen = [0] * len(blocks)

    def count(at: int, module: object, told: Any, kw: Any, out: torch.Tensor) -> None:
        del module, told, kw
        seen[at] += len(out[0])

    layers = [block.get_submodule("self_attn") for block in blocks]
    hooks = [
        layer.register_forward_hook(partial(count, at), with_kwargs=True)
        for at, layer in enumerate(layers)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_slopes_are_the_same_for_any_architecture(kind: str) -> None:
    task, held = outline(kind), examples(5, 0)
    assert task.prefix_cache.size == 16 * 4  # float32s of the width
    batch = {**held, "seed": torch.tensor(7)}
    plain = slopes(task, some(task, 0), batch)
    states = ahead(task, held)[STATES]
    assert not states.requires_grad  # no graph is kept of them
    for one, other in zip(slopes(task, some(task, 0), {**batch, STATES: states}), plain,
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert states.shape == (len(held["mask"]), LENGTH, 16)


def test_padding_of_a_stack_adds_nothing(task: Language) -> None:
    # a stack fills the shorter batch with zeros, states too
    held = [examples(5, 1), examples(2, 2)]
    done = task.precompute(held)
    assert done is not None
    adapters = [some(task, 1), some(task, 2)]
    both = task.evaluate(stack(adapters), stack_examples(done))
    for at in (0, 1):
        alone = task.evaluate(adapters[at], held[at])
        torch.testing.assert_close(both["total"][at], alone["total"], atol=0, rtol=1e-6)


def job(task: Language, budget: Budget, rate: float = 0.05) -> Train:
    held = [{k: v[:size] for k, v in examples(5, size).items()} for size in (5, 3)]
    shards = [Shard(str(c), own, own, own) for c, own in enumerate(held)]
    recipe = Recipe(partial(AdamW, lr=rate))
    clients = Clients(task, METHODS["fedgen-edge"].make(Method()), shards, 0)
    return Train(clients, budget, lambda _: recipe)


def orders(task: Language, count: int = 2) -> list[Order]:
    return [Order((c,), 0, some(task, 3)) for c in range(count)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_round_is_the_same_and_repeats_to_the_bit(task: Language, count: int) -> None:
    told, three = orders(task, count), Budget(2, epochs=3)
    once, again = (job(task, three)(told, stacked=count > 1) for _ in range(2))
    plain = job(replace(task, prefix_cache=NO_PREFIX_CACHE), three)(told, stacked=count > 1)
    for one, two, other in zip(once, again, plain, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        for name, leaf in one.delta.items():
            assert torch.equal(leaf, two.delta[name])
            torch.testing.assert_close(leaf, other.delta[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("budget", "below", "above"),
    [(Budget(2, epochs=3), 5, 15), (Budget(2), 5, 5), (Budget(2, steps=4), 7, 7)],
)
def test_blocks_of_a_text_pass_the_lower_layers_once_an_update(
    task: Language, budget: Budget, below: int, above: int
) -> None:
    # five blocks in batches of two: four steps meet 2 + 2 + 1 + 2, which are no two epochs
    told = job(task, budget)
    with counted(task) as seen:
        told(orders(task, 1), stacked=False)
    assert seen == [below, above]


def test_personalisation_passes_the_lower_layers_once(task: Language) -> None:
    clients = job(task, Budget(2)).clients
    tune = Personalize(clients, Budget(2, 4), Recipe(partial(AdamW, lr=0.05)), Patience(9))
    plain = replace(
        tune, clients=replace(clients, task=replace(task, prefix_cache=NO_PREFIX_CACHE))
    )
    blocks = sum(len(shard.train["mask"]) for shard in clients.shards)
    with counted(task) as seen:
        found = tune(orders(task), stacked=True)
    assert seen[0] == 2 * blocks  # training and validation data, which are the same here
    for one, other in zip(found, plain(orders(task), stacked=True), strict=True):
        assert one.history == pytest.approx(other.history, rel=1e-5)


def test_validation_after_rounds_passes_the_lower_layers_once() -> None:
    table = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"target_modules": ["model.layers.1.*_proj"]},
        "federation": {"clients": 3, "rounds": 1},
        "data": {"length": 64},
        "engine": {"threads": 1, "stack": 2},
    }
    experiment = build(from_table(table))
    task = experiment.task
    assert isinstance(task, Language)
    clients = replace(experiment.clients, task=replace(task, prefix_cache=NO_PREFIX_CACHE))
    plain = replace(experiment, task=clients.task, clients=clients)
    blocks = sum(len(shard.validation["mask"]) for shard in experiment.clients.shards)
    state = experiment.start()
    with counted(task) as seen:
        found = [experiment.validation(state) for _ in range(3)]
    assert seen[0] == blocks
    assert found[0] == found[1] == found[2]
    other = plain.validation(state)
    assert found[0].pop("clients") == pytest.approx(other.pop("clients"), rel=1e-5)
    assert found[0] == pytest.approx(other, rel=1e-5)


def test_states_that_take_too_much_room_are_not_kept(
    task: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = examples(5, 0)
    room = held["mask"].numel() * task.prefix_cache.size
    monkeypatch.setattr(language, "MAX_STATE_BYTES", room)
    assert task.precompute([held]) is not None
    assert task.precompute([held, held]) is None
    monkeypatch.setattr(language, "MAX_STATE_BYTES", room - 1)
    assert task.precompute([held]) is None


@pytest.mark.parametrize("targets", ["q_proj", "all-linear", "(.*embed_tokens|.*1.*q_proj)"])
def test_nothing_is_passed_over_where_the_lowest_layer_is_adapted(targets: str) -> None:
    task = make(targets)
    assert task.prefix_cache is NO_PREFIX_CACHE
    assert task.precompute([examples(2, 0)]) is None


def test_nothing_of_a_full_model_is_passed_over() -> None:
    assert make("q_proj", full=True).prefix_cache is NO_PREFIX_CACHE


def test_blocks_that_hand_on_more_than_one_tensor_are_left_alone() -> None:
    config = FalconConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=False
    )
    module = TokenLoss(FalconForCausalLM(config).eval())
    assert make_prefix_cache(module, ["transformer.h.1.mlp.dense_h_to_4h"]) is NO_PREFIX_CACHE


def test_blocks_are_as_they_were_after_an_error(task: Language) -> None:
    before = [vars(block).get("forward") for block in task.prefix_cache.below]
    with pytest.raises(KeyError), task.prefix_cache.reuse_states(torch.zeros(1, LENGTH, 16)):
        raise KeyError
    assert [vars(block).get("forward") for block in task.prefix_cache.below] == before == [None]
