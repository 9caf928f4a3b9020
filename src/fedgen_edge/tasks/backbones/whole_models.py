"""Write a language model's folder with which every library computes the same results.

transformers 4 and similar libraries read the base of rotary positions from `rope_theta` and their
scaling from `rope_scaling`, and silently use defaults if these are missing. transformers 5 writes
neither.
"""

import json
from pathlib import Path
from typing import Any

from fedgen_edge.types import Leaves

TOKENIZER = "PreTrainedTokenizerFast"
"""A class name with which every version loads tokenizer.json; version 5's name is an alias."""


def write(model: Any, tokenizer: Any, folder: Path, weights: Leaves) -> None:
    """Fill a folder with a model with these weights and its tokenizer."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False) and _is_untied(model):
            config.tie_word_embeddings = False
    model.save_pretrained(folder, state_dict=dict(weights))
    tokenizer.save_pretrained(folder)
    add_legacy_fields(folder)


def _is_untied(model: Any) -> bool:
    """Whether merging an adapter into the embedding or the head has untied them."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def add_legacy_fields(folder: Path) -> None:
    """Add what older libraries need to a language model's folder; newer ones are unaffected."""
    _rewrite_json(folder / "config.json", _add_rope)
    _rewrite_json(folder / "tokenizer_config.json", _name_tokenizer)


def _rewrite_json(path: Path, change: Any) -> None:
    if path.is_file():
        table = change(json.loads(path.read_text("utf-8")))
        path.write_text(json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False), "utf-8")


def _add_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the older names added; existing values are kept.

    This includes the text part of a multimodal model. If layers of several types have different
    positions, there is no common older name.
    """
    if "text_config" in config:
        config = {**config, "text_config": _add_rope(config["text_config"])}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return config
    older = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {k: v for k, v in rope.items() if k not in older}
    return {**older, **config}


def _name_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") != "TokenizersBackend":
        return config
    return {**config, "tokenizer_class": TOKENIZER}
