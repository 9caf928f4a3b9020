"""Embeddings of class names by a pipeline's text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.backbones.loading import FAILURES, describe

PROMPT = "a picture of a {}"
"""The prompt for each class."""


@torch.no_grad()
def embed_classes(pipeline: Path, names: Sequence[str]) -> tuple[Tensor, str]:
    """The embedding of each class's prompt, computed as in diffusers' pipelines.

    Args:
        pipeline: a folder with CLIP's `text_encoder` and `tokenizer`.
        names: the class names.

    Returns:
        Frozen states of the last layer, padding included, float32 `[classes, tokens, width]`; and
        the SHA-256 of the text encoder's weights.

    Raises:
        ConfigError: the classes have no names, or the text encoder is not CLIP's.
    """
    if not names:
        raise ConfigError("data.names=() leaves the backbone's text encoder nothing to read: give "
                          "the classes' names")  # fmt: skip
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = pipeline / "text_encoder"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True)
        encoder = _load_encoder(folder)
    except FAILURES as error:
        reason = describe(error)
        raise ConfigError(
            f"backbone.path={str(pipeline)!r}: its text_encoder and tokenizer are not CLIP's, in "
            f"safetensors ({reason}): take another pipeline"
        ) from None
    digest = pretrained.hash_weights(sorted(folder.glob("*.safetensors")))
    return _embed_prompts(tokenizer, encoder, names), digest


def _load_encoder(folder: Path) -> Any:
    """The text encoder, with every weight from the folder; transformers would randomize gaps."""
    model_class: Any = CLIPTextModel
    encoder, loading_info = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} weights, {missing[0]!r} first")
    # the final projection is not needed: only states of the last layer are used
    unused = sorted(
        k for k in loading_info["unexpected_keys"] if not k.startswith("text_projection")
    )
    if unused:
        raise ValueError(f"it does not use {len(unused)} weights, {unused[0]!r} first")
    return encoder.eval()


def _embed_prompts(tokenizer: Any, encoder: Any, names: Sequence[str]) -> Tensor:
    tokens = tokenizer(
        [PROMPT.format(name) for name in names],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    attention_mask = (
        tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    )
    return encoder(tokens.input_ids, attention_mask=attention_mask).last_hidden_state
