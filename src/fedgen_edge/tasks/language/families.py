"""Public language models by name: the shapes in their `config.json`, without their weights.

Each is named by the last part of its hub id. Values that do not affect shapes are left out.
"""

from typing import Any

ConfigValues = dict[str, Any]


def _llama(
    width: int, inner: int, layers: int, heads: tuple[int, int], **more: Any
) -> ConfigValues:
    """Heads are those of queries, and those of keys and values."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


def _make_shape(kind: str, vocabulary: int, context: int, *, tied: bool = False) -> ConfigValues:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }


def _gpt2(width: int, layers: int, heads: int) -> ConfigValues:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


_LLAMA2 = _make_shape("llama", 32000, 4096)
_SMOL = _make_shape("llama", 49152, 8192, tied=True)
_QWEN = _make_shape("qwen2", 151936, 32768, tied=True)
_QWEN_LARGE = _make_shape("qwen2", 152064, 131072)
_QWEN3 = _make_shape("qwen3", 151936, 40960) | {"head_dim": 128}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}

FAMILIES: dict[str, ConfigValues] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "SmolLM2-135M": _llama(576, 1536, 30, (9, 3), **_SMOL),
    "SmolLM2-360M": _llama(960, 2560, 32, (15, 5), **_SMOL),
    "SmolLM2-1.7B": _llama(2048, 8192, 24, (32, 32), **_SMOL),
    "TinyLlama-1.1B": _llama(2048, 5632, 22, (32, 4), **_LLAMA2),
    "Llama-2-7b": _llama(4096, 11008, 32, (32, 32), **_LLAMA2),
    "Llama-2-13b": _llama(5120, 13824, 40, (40, 40), **_LLAMA2),
    "Llama-2-70b": _llama(8192, 28672, 80, (64, 8), **_LLAMA2),
    "Llama-3.2-1B": _llama(2048, 8192, 16, (32, 8), head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, (24, 8), head_dim=128, tie_word_embeddings=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, (32, 8)),
    "Llama-3.1-70B": _llama(8192, 28672, 80, (64, 8)),
    "Llama-3.1-405B": _llama(16384, 53248, 126, (128, 8)),
    "Mistral-7B-v0.1": _llama(4096, 14336, 32, (32, 8), **_make_shape("mistral", 32000, 32768)),
    "Mixtral-8x7B-v0.1": _llama(
        4096, 14336, 32, (32, 8), **_make_shape("mixtral", 32000, 32768), **_MIXTRAL
    ),
    "Mixtral-8x22B-v0.1": _llama(
        6144, 16384, 56, (48, 8), **_make_shape("mixtral", 32000, 65536), **_MIXTRAL
    ),
    "Qwen2.5-0.5B": _llama(896, 4864, 24, (14, 2), **_QWEN),
    "Qwen2.5-1.5B": _llama(1536, 8960, 28, (12, 2), **_QWEN),
    "Qwen2.5-3B": _llama(2048, 11008, 36, (16, 2), **_QWEN),
    "Qwen2.5-7B": _llama(3584, 18944, 28, (28, 4), **_QWEN_LARGE),
    "Qwen2.5-14B": _llama(5120, 13824, 48, (40, 8), **_QWEN_LARGE),
    "Qwen2.5-32B": _llama(5120, 27648, 64, (40, 8), **_QWEN_LARGE),
    "Qwen2.5-72B": _llama(8192, 29568, 80, (64, 8), **_QWEN_LARGE),
    "Qwen3-0.6B": _llama(1024, 3072, 28, (16, 8), **_QWEN3 | {"tie_word_embeddings": True}),
    "Qwen3-8B": _llama(4096, 12288, 36, (32, 8), **_QWEN3),
}
"""Values of `config.json`, by the last part of a hub id."""


def find_family(path: str) -> ConfigValues | None:
    """The shapes for a name or hub id, ignoring case; None if it is unknown."""
    name = path.rsplit("/", 1)[-1].lower()
    return next((shape for known, shape in FAMILIES.items() if known.lower() == name), None)
