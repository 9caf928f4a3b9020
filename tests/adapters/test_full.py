"""The whole model as leaves: its own forward pass, its own gradient, and its own folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedgen_edge.adapters.full import Full
from fedgen_edge.config import Settings, from_table
from fedgen_edge.data.batches import pack
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Leaves

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
WIDTH, VOCABULARY = 8, 10


class Reader(nn.Module):
    """A module that holds the model as `model`, as `Full.call` asks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def llama(*, tied: bool, kind: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    rng = generator("weights")
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=rng)
    return model.to(kind).eval()


def moved(own: Leaves) -> Leaves:
    """Leaves that are not the pretrained ones."""
    rng = generator("moved")
    return {k: v + 0.1 * torch.randn(v.shape, generator=rng) for k, v in own.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_call_is_the_models_own_forward_pass_with_these_weights(tied: bool) -> None:
    model = llama(tied=tied)
    full = Full(model)
    own = moved(full.init(generator(0)))
    called = full.call(Reader(model), own, IDS, None)
    other = llama(tied=tied)
    other.load_state_dict(own, strict=False)
    torch.testing.assert_close(called, other(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, llama(tied=tied)(IDS).logits)


def test_tied_weights_are_one_leaf_and_move_together() -> None:
    # Tied, the output layer's weight is the embedding's: 10 * 8 = 80 parameters fewer.
    tied, untied = (Full(llama(tied=tied)) for tied in (True, False))
    assert set(untied.shapes()) - set(tied.shapes()) == {"lm_head.weight"}
    assert size(untied) - size(tied) == WIDTH * VOCABULARY
    own = tied.init(generator(0))
    assert {k: tuple(v.shape) for k, v in own.items()} == tied.shapes()
    own["model.embed_tokens.weight"] = torch.zeros(VOCABULARY, WIDTH)
    # A zero output layer gives zero logits.
    assert not tied.call(Reader(tied.model), own, IDS, None).any()


def size(full: Full) -> int:
    return sum(torch.Size(shape).numel() for shape in full.shapes().values())


def test_the_gradient_is_the_models_own() -> None:
    model = llama(tied=True)
    full = Full(model)
    own = {k: v.requires_grad_() for k, v in full.init(generator(0)).items()}
    loss = full.call(Reader(model), own, IDS, None).square().sum()
    slopes = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    plain = llama(tied=True)
    plain(IDS).logits.square().sum().backward()
    for name, weight in plain.named_parameters():
        assert weight.grad is not None
        assert slopes[name].any()
        torch.testing.assert_close(slopes[name], weight.grad)


def test_leaves_are_float32_and_the_arithmetic_is_the_backbones() -> None:
    model = llama(tied=True, kind=torch.bfloat16)
    full = Full(model)
    own = {k: v.requires_grad_() for k, v in full.init(generator(0)).items()}
    out = full.call(Reader(model), own, IDS, None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, model(IDS).logits)
    slopes = torch.autograd.grad(out.float().sum(), list(own.values()))
    assert {v.dtype for v in (*own.values(), *slopes)} == {torch.float32}


def test_the_leaves_are_copies() -> None:
    model = llama(tied=True)
    own = Full(model).init(generator(0))
    for leaf in own.values():
        leaf.zero_()
    assert all(p.any() for p in model.parameters())


# ---- as the language task has it


@pytest.fixture(scope="module")
def settings() -> Settings:
    return from_table(
        {
            "backbone": {"path": "tiny", "precision": "float32"},
            "method": {"name": "fedavg-full"},
        }
    )


@pytest.fixture(scope="module")
def task(settings: Settings) -> Language:
    return language.build(settings, full=True, device=torch.device("cpu"))


def test_the_loss_of_a_full_model_and_its_gradient_are_the_models_own(task: Language) -> None:
    own = {k: v.requires_grad_() for k, v in moved(task.init(generator(0))).items()}
    ids = task.encode(["One day."])
    loss = task.loss(own, pack(ids, [3], 12), "").total
    plain = AutoModelForCausalLM.from_pretrained(task.model.folder)
    plain.load_state_dict({k: v.detach() for k, v in own.items()}, strict=False)
    told = torch.tensor(ids)
    theirs = F.cross_entropy(plain(told).logits[0, :-1], told[0, 1:], reduction="sum")
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    slopes = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    theirs.backward()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(slopes[name], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_saved_full_model_is_a_folder_that_transformers_loads(
    task: Language, settings: Settings, tmp_path: Path
) -> None:
    own = moved(task.init(generator(0)))
    task.model.save(tmp_path / "anna", own, settings, {"client": "anna"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "anna").eval()
    ours = task.model.adapter.call(Reader(task.module.model), own, IDS, None)
    assert torch.equal(theirs(IDS).logits, ours)
    assert not torch.equal(ours, task.module.model(IDS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_a_saved_full_model_is_read_bit_for_bit(
    task: Language, settings: Settings, tmp_path: Path
) -> None:
    own = moved(task.init(generator(0)))
    task.model.save(tmp_path / "anna", own, settings, {})
    found = task.model.load(tmp_path / "anna")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[k], v) for k, v in own.items())


def test_a_saved_full_model_says_where_it_came_from(
    task: Language, settings: Settings, tmp_path: Path
) -> None:
    task.model.save(tmp_path / "anna", task.init(generator(0)), settings, {"client": "anna"})
    assert "anna" in (tmp_path / "anna" / "provenance.json").read_text()


def test_a_full_model_cannot_be_stacked(task: Language) -> None:
    assert not task.model.is_stackable
