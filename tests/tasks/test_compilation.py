"""Compiled blocks of layers: the same numbers, in training alone, and a line without compiler."""

import shutil
from functools import partial

import pytest
import torch
from torch.optim import SGD

from fedgen_edge import hardware
from fedgen_edge.config import from_table
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.client import Recipe, local_update
from fedgen_edge.leaves import stack
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.prefix_cache import STATES
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Batch

LENGTH = 8
pytestmark = [  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]


def make(*, compiled: bool, full: bool = False) -> Language:
    table = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"target_modules": ["model.layers.1.*_proj"]},
        "data": {"length": LENGTH},
        "engine": {"compile": compiled},
    }
    return language.build(from_table(table), full=full, device=torch.device("cpu"))


def batch(*axes: int) -> Batch:
    told = generator("batch", *axes)
    tokens = torch.randint(1, 200, (*axes, LENGTH + 1), generator=told)
    ones = torch.ones(*axes, LENGTH, dtype=torch.int64)
    return {
        "tokens": tokens[..., :-1],
        "labels": tokens[..., 1:],
        "mask": ones.bool(),
        "segment": ones,
        "position": torch.arange(LENGTH).expand(*axes, LENGTH),
        "words": torch.ones(axes, dtype=torch.int64),
        "epoch": torch.zeros(axes[:-1], dtype=torch.int64),
        "last": torch.zeros(axes[:-1], dtype=torch.bool),
    }


def test_training_ends_as_without_and_only_training_is_compiled() -> None:
    plain, fast = (make(compiled=compiled) for compiled in (False, True))
    adapter = plain.init(generator("init"))
    recipe = Recipe(partial(SGD, lr=0.1))  # Adam would make much of what is nearly zero
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for clients in (3, 5, 7):
        begun = stack([adapter] * clients)
        ends = [
            local_update(task, begun, {}, [batch(clients, 2)] * 2, recipe)[0]
            for task in (plain, fast)
        ]
        for name, leaf in ends[0].items():
            torch.testing.assert_close(ends[1][name], leaf, rtol=1e-4, atol=1e-5)
            assert leaf.any()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2  # one for each of the two kinds of blocks, whatever the size
    told = {k: v for k, v in batch(4, 2).items() if k not in {"epoch", "last"}}
    found = [task.evaluate(stack([adapter] * 4), told)["total"] for task in (plain, fast)]
    assert torch.equal(*found)  # the very same arithmetic
    shares = {k: v[0, :1] for k, v in told.items()}
    hardware.saved_bytes(fast, adapter, shares, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_what_lower_layers_make_of_a_text_is_passed_over_as_before() -> None:
    fast, blocks = make(compiled=True), batch(2)
    layers = fast.loaded.model.model.layers
    own = [layer.forward for layer in layers]
    (ahead,) = fast.precompute([blocks]) or ()
    assert STATES in ahead
    with fast.prefix_cache.reuse_states(ahead[STATES]):
        assert layers[0].forward is not own[0]
    assert [layer.forward for layer in layers] == own


def test_where_there_is_no_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"engine\.compile=true needs a C\+\+ compiler"):
        make(compiled=True)
    assert make(compiled=True, full=True)  # of adapters alone


def test_dropout_does_not_go_with_it() -> None:
    table = {"backbone": {"path": "tiny"}, "adapter": {"dropout": 0.1}, "engine": {"compile": True}}
    with pytest.raises(
        ConfigError, match=r"engine\.compile=true does not go with adapter\.dropout"
    ):
        language.build(from_table(table), full=False, device=torch.device("cpu"))
