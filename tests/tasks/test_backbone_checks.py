"""What a language model computes, judged by plain transformers on models that are known to fail."""

from typing import Any

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.backbones.attention import use_grouped_attention
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.backbone_checks import check_causal, check_packing
from fedgen_edge.tasks.language.loss import TokenLoss

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
BERT = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
BART = {
    "vocab_size": 99,
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "pad_token_id": 1,
}
LLAMA = {**BERT, "num_key_value_heads": 1}
EXPERTS = {**LLAMA, "num_hidden_layers": 2, "moe_intermediate_size": 8}


def make(kind: type[PreTrainedModel], seed: int = 0, **shape: Any) -> PreTrainedModel:
    """A small random model; weights as large as a trained model's, so that layers matter."""
    torch.manual_seed(seed)
    config = kind.config_class(**shape)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    use_grouped_attention(model)
    return model


@TYPES
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (T.BertLMHeadModel, BERT),
        (T.ErnieForCausalLM, BERT),
        (T.ElectraForCausalLM, {**BERT, "embedding_size": 16}),
        (T.RoFormerForCausalLM, {**BERT, "embedding_size": 16}),
        (T.MegatronBertForCausalLM, BERT),
    ],
)
def test_an_encoder_is_refused_and_its_decoder_is_not(
    kind: type[PreTrainedModel], shape: dict[str, Any], dtype: torch.dtype
) -> None:
    encoder = make(kind, **shape, is_decoder=False).to(dtype)
    rows = torch.tensor([[5, 6, 7], [5, 6, 8]])
    one, other = encoder(rows).logits[:, 0]
    assert not torch.equal(one, other)  # transformers' own call: the last token changes the first
    with pytest.raises(ConfigError, match=r"^backbone\.path='x', a \S+, is not causal .*decoder"):
        check_causal("x", encoder)
    check_causal("x", make(kind, **shape, is_decoder=True).to(dtype))


def test_a_model_that_reads_both_ways_by_design_is_refused() -> None:
    model = make(T.XLNetLMHeadModel, vocab_size=99, d_model=16, n_layer=1, n_head=2, d_inner=16)
    with pytest.raises(ConfigError, match="is not causal: later tokens change"):
        check_causal("x", model)


@TYPES
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (T.BartForCausalLM, {}),
        (T.MBartForCausalLM, {}),
        (T.MarianForCausalLM, {"decoder_start_token_id": 0}),
        (T.PegasusForCausalLM, {}),
        (T.BlenderbotForCausalLM, {}),
        (T.PLBartForCausalLM, {}),
        (T.MvpForCausalLM, {}),
    ],
)
def test_models_that_ignore_positions_are_refused(
    kind: type[PreTrainedModel], more: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make(kind, **BART, **more).to(dtype)
    rows, place = torch.tensor([[5, 6, 7]]), torch.tensor([[4, 5, 6]])
    # transformers' own call: positions change nothing
    assert torch.equal(model(rows, position_ids=place).logits, model(rows).logits)
    check_causal("x", model)
    with pytest.raises(ConfigError, match=r"does not begin positions anew.*ignores position_ids"):
        check_packing("x", model)


def test_models_in_which_documents_meet_are_refused() -> None:
    model = make(T.RwkvForCausalLM, vocab_size=99, hidden_size=8, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"^backbone\.path='x', a rwkv, lets a document see the"):
        check_packing("x", model)


def test_a_model_that_takes_no_blocks_is_refused() -> None:
    model = make(T.BloomForCausalLM, vocab_size=99, hidden_size=8, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match=r"a bloom, does not read several documents in a block"):
        check_packing("x", model)


def test_a_model_with_positions_of_its_own_counting_is_refused() -> None:
    # RoBERTa counts positions from its padding token's number
    model = make(T.RobertaForCausalLM, **BERT, is_decoder=True)
    rows, place = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 2]])
    assert not torch.allclose(model(rows, position_ids=place).logits, model(rows).logits)
    with pytest.raises(ConfigError, match="something else with the mask and the positions"):
        check_packing("x", model)


@TYPES
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (T.Qwen3MoeForCausalLM, {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2}),
        (T.Qwen2MoeForCausalLM, {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2}),
        (T.MixtralForCausalLM, {**EXPERTS, "num_local_experts": 4}),
        (T.OlmoeForCausalLM, {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_mixtures_of_experts_are_taken_whatever_their_weights(
    kind: type[PreTrainedModel], shape: dict[str, Any], dtype: torch.dtype
) -> None:
    for seed in range(20):
        model = make(kind, seed, **shape).to(dtype)
        check_causal("x", model)
        check_packing("x", model)


@TYPES
def test_a_plain_decoder_is_taken(dtype: torch.dtype) -> None:
    model = T.AutoModelForCausalLM.from_pretrained(pretrained._make_tiny(), dtype=dtype)
    check_causal("tiny", model)
    check_packing("tiny", model)


def test_llama_4s_trunk_is_where_it_is() -> None:
    shape = {**LLAMA, "intermediate_size_mlp": 16, "head_dim": 8, "num_local_experts": 2}
    model = make(T.Llama4ForCausalLM, **shape, layer_types=["full_attention"])
    module = TokenLoss(model)
    assert module.plain_head  # so that not all logits are held
    check_packing("x", model)


def test_defaults_that_are_an_expression_stay_one() -> None:
    for kind, targets in language.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items():
        wanted = [targets] if isinstance(targets, str) else targets
        assert language.get_default_targets(kind) == wanted


@TYPES
def test_a_model_whose_numbers_are_not_finite_is_refused_for_that(dtype: torch.dtype) -> None:
    model = make(T.LlamaForCausalLM, **LLAMA).to(dtype)
    model.model.norm.weight.data[0] = float("nan")
    for check in (check_causal, check_packing):
        with pytest.raises(ConfigError, match="a llama, computes numbers that are not finite"):
            check("x", model)


def test_no_memory_left_is_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(T.LlamaForCausalLM, **LLAMA)
    monkeypatch.setattr(model, "forward", lambda *_, **__: torch.empty(2**48))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check_causal("x", model)
