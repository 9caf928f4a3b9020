import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fedgen_edge.seeds import generator
from fedgen_edge.tasks.backbones import attention
from fedgen_edge.tasks.backbones.attention import (
    ATTENTION_NAME,
    MAX_LENGTH,
    grouped_attention,
    use_grouped_attention,
)
from fedgen_edge.tasks.language.loss import make_attention_mask as mask

LAYER = nn.Module()


class Grouped(nn.Module):
    """What transformers' own attention asks of a layer."""

    num_key_value_groups = 2
    is_causal = True


def drawn(heads: int, groups: int, length: int, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator("attention", heads, length)
    return tuple(
        torch.randn(2, n, length, width, generator=rng, requires_grad=True)
        for n in (heads, groups, groups)
    )  # pyright: ignore[reportReturnType]


def segments(length: int) -> Tensor:
    """Two documents, and padding in the first row."""
    segment = torch.ones(2, length, dtype=torch.int32)
    segment[:, length // 3 :] = 2
    segment[0, -2:] = 0
    return segment


def plain(query: Tensor, key: Tensor, value: Tensor, added: Tensor, scaling: float) -> Tensor:
    """Attention as it is written down, heads repeated."""
    times = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(times, 1) for each in (key, value))
    share = (query @ key.mT * scaling + added).softmax(-1)
    return (share @ value).transpose(1, 2)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_it_is_attention_with_its_gradients(heads: int, groups: int) -> None:
    given = drawn(heads, groups, 7)
    added = mask(segments(7), torch.float32)
    found, scores = grouped_attention(LAYER, *given, added, scaling=0.3)
    expected = plain(*given, added, 0.3)
    torch.testing.assert_close(found, expected)
    assert scores is None
    outer = torch.rand(found.shape, generator=generator("outer"))
    for got, want in zip(
        torch.autograd.grad((found * outer).sum(), given),
        torch.autograd.grad((expected * outer).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_without_a_scale_it_is_the_root_of_the_width() -> None:
    given, added = drawn(2, 2, 5), mask(segments(5), torch.float32)
    torch.testing.assert_close(
        grouped_attention(LAYER, *given, added)[0], plain(*given, added, 8**-0.5)
    )


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_where_nothing_is_learnt_it_says_the_same(
    heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "baddbmm")
    given, added = drawn(heads, groups, 7), mask(segments(7), torch.float32)
    with torch.no_grad():
        found, _ = grouped_attention(LAYER, *given, added, scaling=0.3)
    torch.testing.assert_close(found, plain(*given, added, 0.3))
    assert found.is_contiguous()


@pytest.mark.parametrize("case", ["no mask", "words", "long"])
def test_what_it_does_not_do_torchs_kernel_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("not this way")

    monkeypatch.setattr(torch, "baddbmm", never)
    length = MAX_LENGTH + 1 if case == "long" else 5
    query, key, value = drawn(4, 2, length)
    added = mask(segments(length), torch.float32)
    told = {"no mask": None, "words": added == 0, "long": added}[case]
    found, _ = grouped_attention(Grouped(), query, key, value, told)
    key, value = (each.repeat_interleave(2, 1) for each in (key, value))
    same = F.scaled_dot_product_attention(query, key, value, told, is_causal=told is None)
    torch.testing.assert_close(found, same.transpose(1, 2))


def small(**told: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **told,  # pyright: ignore[reportArgumentType]
    )
    return LlamaForCausalLM(config).eval()


def test_a_model_says_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, segment = small(), segments(9)
    ids = torch.arange(18).view(2, 9) % 11
    given = {"input_ids": ids, "attention_mask": mask(segment, torch.float32), "use_cache": False}
    before = model(**given).logits
    use_grouped_attention(model)
    asked = []
    kernel = torch.baddbmm
    monkeypatch.setattr(
        attention.torch, "baddbmm", lambda *a, **k: asked.append(1) or kernel(*a, **k)
    )
    torch.testing.assert_close(model(**given).logits, before)
    assert len(asked) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, before)
    again = model(ids).logits  # transformers' own mask, or none
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(again, model(ids).logits)


def test_a_model_with_another_attention_keeps_it() -> None:
    model = small(attn_implementation="eager")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "eager" != ATTENTION_NAME
