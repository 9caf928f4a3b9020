"""A tiny random model of every causal architecture that the installed transformers knows."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedgen_edge.seeds import seed_global_generators

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 300
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LARGEST = 40_000_000
"""Parameters of a model that is still tiny."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 0,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim_model_base": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 1,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "head_dim": 8,
    "attention_head_dim": 8,
    "rotary_dim": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "dim_ff": 64,
    "ffn_hidden_size": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
    "sliding_window": 256,
    "num_mtp_layers": 0,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "is_decoder": True,
    "n_shared_experts": 1,
    "moe_k": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "swa_head_dim": 16,
    "unpadded_vocab_size": VOCABULARY,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "expert_ffn_hidden_size": 32,
}
"""Usual fields of configurations, and what is small enough; a configuration gets those it has."""

SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "ctrl": {"dff": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dots3_note": {"text_config": {"per_layer_config": {}}},
    "dots3_note_text": {"per_layer_config": {}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 256},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "xlm": {"n_words": VOCABULARY, "emb_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What else an architecture needs, by its type."""


def make_config(kind: str) -> Any:
    """The tiny configuration of a type."""
    return shrink(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def shrink(config_class: Any, special: dict[str, Any]) -> Any:
    """A configuration of this class with the usual fields made small."""
    fields = {f.name for f in dataclasses.fields(config_class)}
    usual = {k: v for k, v in SIZES.items() if k in fields}
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        usual["num_key_value_heads"] = SIZES["num_attention_heads"]
    usual |= _pattern(config_class, fields)
    inner = {
        name: shrink(inner_class, special.get(name, {}))
        for name in config_class.sub_configs
        if (inner_class := _inner_class(config_class, name))
    }
    return config_class(**{**usual, **special, **inner})


def _pattern(config_class: Any, fields: set[str]) -> dict[str, Any]:
    """A layer of each kind that the architecture mixes where nothing is said; none where alike."""
    try:
        default = config_class()
    except ValueError:
        return {}
    mixed = {
        name: list(dict.fromkeys(types))
        for name in ("layer_types", "mlp_layer_types")
        if name in fields and (types := getattr(default, name, None))
    }
    count = max([2, *map(len, mixed.values())])
    if not mixed:
        return {}
    return {
        "num_hidden_layers": count,
        **{name: [*types, *types[-1:] * count][:count] for name, types in mixed.items()},
    }


def _inner_class(config_class: Any, name: str) -> Any:
    """The class of a configuration within one, as it has it where nothing is said; or none."""
    inner = config_class.sub_configs[name]
    if dataclasses.is_dataclass(inner):
        return inner
    default = getattr(config_class(), name, None)
    return type(default) if dataclasses.is_dataclass(default) else None


def write_model(kind: str, folder: Path) -> None:
    """Save a tiny model of this type, its weights drawn at random, and a tokenizer of bytes.

    Raises:
        ValueError: its configuration has fields that are not among the usual ones, and it is large.
    """
    config = make_config(kind)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size} parameters are not tiny")
    with seed_global_generators("tiny"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "A_log" not in name:
                weight.mul_(3)  # nearer to the size of trained weights, so that layers matter
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and marks of start and end."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    coder = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=coder, bos_token="<s>", eos_token="</s>")
