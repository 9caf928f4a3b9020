"""A whole language model's folder, of which every reader computes the same.

transformers 4, and what is built like it, take the base of rotary positions from `rope_theta` and
their scaling from `rope_scaling`, and where these are missing a default, without a word. What
transformers 5 writes has neither.
"""

import json
from pathlib import Path
from typing import Any

from fedgen_edge.types import Leaves

TOKENIZER = "PreTrainedTokenizerFast"
"""The class by whose name every version loads a tokenizer.json; the name since 5 is its alias."""


def write(model: Any, tokenizer: Any, folder: Path, weights: Leaves) -> None:
    """Fill a folder with a model of these weights and its tokenizer."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False) and _is_untied(model):
            config.tie_word_embeddings = False
    model.save_pretrained(folder, state_dict=dict(weights))
    tokenizer.save_pretrained(folder)
    add_legacy_fields(folder)


def _is_untied(model: Any) -> bool:
    """Whether merging an adapter of one of them has parted the embedding and the head."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def add_legacy_fields(folder: Path) -> None:
    """Add to a language model's folder what older readers need; newer ones read the same of it."""
    _rewrite_json(folder / "config.json", _add_rope)
    _rewrite_json(folder / "tokenizer_config.json", _name_tokenizer)


def _rewrite_json(path: Path, change: Any) -> None:
    if path.is_file():
        table = change(json.loads(path.read_text("utf-8")))
        path.write_text(json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False), "utf-8")


def _add_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration, also with the older names; those it has already are kept.

    So is the text part of one that reads more. Where layers of several types have positions of
    their own there is no common older name.
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
