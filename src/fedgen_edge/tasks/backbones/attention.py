"""Attention for short blocks on a CPU, several times as fast as torch's own.

torch's CPU kernel never stores all scores, so its backward pass recomputes them, slowly in bf16.
For blocks of a few hundred tokens the scores are small, and three batched products and a softmax
are enough. Without gradients, torch's own kernel is faster.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "fedgen-grouped"
MAX_LENGTH = 512
"""Longest block, in tokens, whose scores take less memory than the layer's other activations."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface, which falls back to transformers' own for torch.

    Heads that share keys and values are rows of one product, so that nothing is repeated for them.

    Args:
        module: the layer.
        query: `[rows, heads, length, width]`.
        key: `[rows, groups, length, width]`.
        value: like the key.
        attention_mask: added to scores, `[rows, 1, length, length]`.
        options: `scaling` of the scores (None: 1 / sqrt(width)), and others.

    Returns:
        `[rows, length, heads, width]`, and no scores.
    """
    rows, heads, length, width = query.shape
    groups, key_length = key.shape[1:3]
    is_supported = (
        attention_mask is not None
        and attention_mask.is_floating_point()
        and attention_mask.shape[1:] == (1, length, key_length)
        and length <= MAX_LENGTH
        and not options.get("dropout")
        and options.get("position_bias") is None
    )
    if not is_supported:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    scaling = options.get("scaling")
    if not torch.is_grad_enabled():
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    num_products = rows * groups
    scores = torch.baddbmm(
        query.new_zeros(()),
        query.reshape(num_products, -1, width),
        key.reshape(num_products, key_length, width).mT,
        beta=0,
        alpha=1 / sqrt(width) if scaling is None else scaling,
    ).view(rows, heads, length, key_length)
    attention_weights = (scores + attention_mask).softmax(-1)
    output = attention_weights.view(num_products, -1, key_length) @ value.reshape(
        num_products, key_length, -1
    )
    return output.view(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def use_grouped_attention(model: Any) -> None:
    """Make a model with torch's attention use this one on a CPU."""
    if model.device.type == "cpu" and getattr(model.config, "_attn_implementation", "") == "sdpa":
        model.set_attn_implementation(ATTENTION_NAME)
