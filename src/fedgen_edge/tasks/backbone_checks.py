"""What a language model must compute to be trained on packed blocks, checked on a few tokens.

Logits are compared in units of their own size: rounding moves them by less than the root of their
type's epsilon, or a few times what it moves those of a block's first document. Gradients are on, as
in training: without them attention may be another kernel's.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.loading import describe
from fedgen_edge.tasks.loss import TokenLoss
from fedgen_edge.types import Batch

LENGTH = 6
"""Tokens in a document of the checks."""
SPREAD = 4
"""Rounding moves one document by at most so many times what it moves another."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What models raise on input that they do not know."""


def check_causal(path: str, model: Any) -> None:
    """Refuse a model, used plainly, in which a later token changes earlier logits.

    Args:
        path: what the user calls the backbone.
        model: a causal language model of transformers.

    Raises:
        ConfigError: it is not causal, or it does not read tokens alone.
    """
    one, other = _documents(model)[:2]
    half = LENGTH // 2
    rows = torch.stack([one, torch.cat([one[:half], other[half:]])])
    logits = _compute(path, model, "text without other inputs", lambda: _plain(model, rows))
    encoder = getattr(model.config, "is_decoder", True) is False
    if _distance(*logits[:, :half]) > (0.0 if encoder else _tolerance(model)):
        cause = " (is_decoder is false in its config.json)" if encoder else ""
        raise ConfigError(
            f"{_name(path, model)} is not causal{cause}: later tokens change what it predicts "
            "before them: take a causal language model"
        )


def check_packing(path: str, model: Any) -> None:
    """Refuse a model in which a packed document does not cost what it costs alone.

    Two blocks differ in their first document; the second must have the logits that transformers'
    own call gives it alone. The first document's distance from itself alone tells the rounding.

    Args:
        path: what the user calls the backbone.
        model: a causal language model of transformers.

    Raises:
        ConfigError: documents of a block meet, positions do not begin anew, or it does not read
            blocks of several documents.
    """
    first, second, other = _documents(model)
    blocks = [torch.cat([start, second]) for start in (first, other)]
    batch, task = _pack(torch.stack(blocks)), "several documents in a block"
    packed = _compute(path, model, task, lambda: TokenLoss(model).logits(batch))
    alone = _compute(path, model, task, lambda: _plain(model, torch.stack([first, second])))
    rounding = _distance(packed[0, :LENGTH], alone[0])
    if rounding > SPREAD * _tolerance(model):
        raise ConfigError(
            f"{_name(path, model)} computes something else with the mask and the positions of a "
            "packed block than without them: take another"
        )
    after = packed[:, LENGTH : 2 * LENGTH]
    limit = max(SPREAD * rounding, _tolerance(model))
    if _distance(*after) > limit:
        raise ConfigError(
            f"{_name(path, model)} lets a document see the one before it in its block: take another"
        )
    if _distance(after[0], alone[1]) > limit:
        raise ConfigError(
            f"{_name(path, model)} does not begin positions anew in each document of a block (it "
            "ignores position_ids): take another"
        )


def _documents(model: Any) -> list[Tensor]:
    """Three documents of random tokens."""
    known = model.config.get_text_config().vocab_size
    tokens = torch.randint(known, (3, LENGTH), generator=generator("backbone checks"))
    return [*tokens.to(model.device)]


def _pack(rows: Tensor) -> Batch:
    """Blocks of two documents each, and a token of padding."""
    place = torch.arange(2 * LENGTH, device=rows.device).expand_as(rows)
    fields = {"tokens": rows, "segment": place // LENGTH + 1, "position": place % LENGTH}
    return {name: torch.nn.functional.pad(field, (0, 1)) for name, field in fields.items()}


def _plain(model: Any, rows: Tensor) -> Tensor:
    return model(rows, use_cache=False).logits


def _compute(path: str, model: Any, task: str, forward: Callable[[], Tensor]) -> Tensor:
    """Logits in float32, each token's around their mean.

    Raises:
        ConfigError: the model does not compute them, or they are not finite.
    """
    try:
        with torch.enable_grad():
            logits = forward().detach().float()
    except FAILURES as error:
        raise ConfigError(
            f"{_name(path, model)} does not read {task} ({describe(error)}): take another"
        ) from None
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            f"{_name(path, model)} computes numbers that are not finite: its weights or its "
            "config.json are damaged: take another, or backbone.precision='float32'"
        )
    return logits - logits.mean(-1, keepdim=True)


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of a token's logits, in units of their size."""
    size = torch.maximum(one.norm(dim=-1), other.norm(dim=-1)).clamp(min=torch.finfo().tiny)
    return float(((one - other).norm(dim=-1) / size).max())


def _tolerance(model: Any) -> float:
    return sqrt(torch.finfo(model.dtype).eps)


def _name(path: str, model: Any) -> str:
    return f"backbone.path={path!r}, a {model.config.model_type},"
