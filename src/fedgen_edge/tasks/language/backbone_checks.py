"""Check on a few tokens that a language model can be trained on packed blocks.

Logits are compared relative to their size: rounding changes them by less than the square root of
their dtype's epsilon, or a few times the rounding error of a block's first document. Gradients are
on, as in training, because without them attention may use another kernel.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.backbones.loading import describe
from fedgen_edge.tasks.language.loss import TokenLoss
from fedgen_edge.types import Batch

LENGTH = 6
"""Tokens per document in the checks."""
ROUNDING_FACTOR = 4
"""Largest ratio of the rounding errors of two documents."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions of models on unsupported inputs."""


def check_causal(path: str, model: Any) -> None:
    """Refuse a model in which a later token changes earlier logits, without packing.

    Args:
        path: the user's name for the backbone.
        model: a causal language model of transformers.

    Raises:
        ConfigError: it is not causal, or it needs inputs besides tokens.
    """
    first, second = _draw_documents(model)[:2]
    half = LENGTH // 2
    rows = torch.stack([first, torch.cat([first[:half], second[half:]])])
    logits = _compute(path, model, "text without other inputs", lambda: _compute_plain(model, rows))
    encoder = getattr(model.config, "is_decoder", True) is False
    if _measure_distance(*logits[:, :half]) > (0.0 if encoder else _get_tolerance(model)):
        cause = " (is_decoder is false in its config.json)" if encoder else ""
        raise ConfigError(
            f"{_describe_model(path, model)} is not causal{cause}: later tokens change "
            "what it predicts "
            "before them: take a causal language model"
        )


def check_packing(path: str, model: Any) -> None:
    """Refuse a model in which a packed document has another loss than alone.

    Two blocks differ in their first document; the second must have the logits that a plain call
    gives it alone. The first document's distance from its own plain call measures rounding.

    Args:
        path: the user's name for the backbone.
        model: a causal language model of transformers.

    Raises:
        ConfigError: documents of a block see each other, positions do not restart, or the model
            does not accept blocks of several documents.
    """
    first, second, other = _draw_documents(model)
    blocks = [torch.cat([start, second]) for start in (first, other)]
    batch, task = _pack(torch.stack(blocks)), "several documents in a block"
    packed = _compute(path, model, task, lambda: TokenLoss(model).logits(batch))
    unpacked = _compute(
        path, model, task, lambda: _compute_plain(model, torch.stack([first, second]))
    )
    rounding = _measure_distance(packed[0, :LENGTH], unpacked[0])
    if rounding > ROUNDING_FACTOR * _get_tolerance(model):
        raise ConfigError(
            f"{_describe_model(path, model)} computes something else with the mask and "
            "the positions of a "
            "packed block than without them: take another"
        )
    after = packed[:, LENGTH : 2 * LENGTH]
    limit = max(ROUNDING_FACTOR * rounding, _get_tolerance(model))
    if _measure_distance(*after) > limit:
        raise ConfigError(
            f"{_describe_model(path, model)} lets a document see the one before it in "
            "its block: take another"
        )
    if _measure_distance(after[0], unpacked[1]) > limit:
        raise ConfigError(
            f"{_describe_model(path, model)} does not begin positions anew in each "
            "document of a block (it "
            "ignores position_ids): take another"
        )


def _draw_documents(model: Any) -> list[Tensor]:
    """Three documents of random tokens."""
    vocabulary_size = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary_size, (3, LENGTH), generator=generator("backbone checks"))
    return [*tokens.to(model.device)]


def _pack(rows: Tensor) -> Batch:
    """Blocks of two documents each, and a token of padding."""
    place = torch.arange(2 * LENGTH, device=rows.device).expand_as(rows)
    fields = {"tokens": rows, "segment": place // LENGTH + 1, "position": place % LENGTH}
    return {name: torch.nn.functional.pad(field, (0, 1)) for name, field in fields.items()}


def _compute_plain(model: Any, rows: Tensor) -> Tensor:
    return model(rows, use_cache=False).logits


def _compute(path: str, model: Any, task: str, forward: Callable[[], Tensor]) -> Tensor:
    """Logits in float32, centered for each token.

    Raises:
        ConfigError: the model fails to compute them, or they are not finite.
    """
    try:
        with torch.enable_grad():
            logits = forward().detach().float()
    except FAILURES as error:
        raise ConfigError(
            f"{_describe_model(path, model)} does not read {task} ({describe(error)}): take another"
        ) from None
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            f"{_describe_model(path, model)} computes numbers that are not finite: its "
            "weights or its "
            "config.json are damaged: take another, or backbone.precision='float32'"
        )
    return logits - logits.mean(-1, keepdim=True)


def _measure_distance(first: Tensor, second: Tensor) -> float:
    """The largest difference of a token's logits, relative to their size."""
    size = torch.maximum(first.norm(dim=-1), second.norm(dim=-1)).clamp(min=torch.finfo().tiny)
    return float(((first - second).norm(dim=-1) / size).max())


def _get_tolerance(model: Any) -> float:
    return sqrt(torch.finfo(model.dtype).eps)


def _describe_model(path: str, model: Any) -> str:
    return f"backbone.path={path!r}, a {model.config.model_type},"
