"""Classes as a pipeline's text encoder reads their names."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fedgen_edge.errors import ConfigError

PROMPT = "a picture of a {}"
"""What is read for each class."""


@torch.no_grad()
def embed(pipeline: Path, names: Sequence[str]) -> Tensor:
    """Each class's sentence as diffusers' pipelines embed a prompt.

    Args:
        pipeline: a folder with `text_encoder` and `tokenizer`, CLIP's.
        names: of the classes.

    Returns:
        float32 `[classes, tokens, width]`: frozen, of the last layer, padding included.

    Raises:
        ConfigError: no class has a name, or the text encoder is another one.
    """
    if not names:
        raise ConfigError("data.names=() leaves the backbone's text encoder nothing to read: give "
                          "the classes' names")  # fmt: skip
    try:
        tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(
            pipeline / "text_encoder",
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        ).eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"backbone.path={str(pipeline)!r}: its text_encoder and tokenizer are not CLIP's, in "
            f"safetensors ({reason}): take another pipeline"
        ) from None
    told = tokenizer(
        [PROMPT.format(name) for name in names],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    seen = told.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(told.input_ids, attention_mask=seen).last_hidden_state
