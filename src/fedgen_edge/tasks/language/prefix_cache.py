"""Cache the output of the blocks below the lowest adapted layer, which never changes for a text.

So a text passes through them only once. Blocks stay in place in the model, and only their `forward`
is replaced: this works for every model that passes one tensor from block to block, and is tested on
a model before it is used.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedgen_edge.tasks.language.loss import TokenLoss
from fedgen_edge.types import Batch

STATES = "states"
"""The batch field of the lower blocks' output, `[*clients, batch, length, width]`."""
MAX_STATE_BYTES = 2**29
"""Maximum bytes of cached states; if they need more, none are cached."""


@dataclass(frozen=True)
class PrefixCache:
    """A model's blocks in two parts; with a size of zero, no states are cached."""

    module: TokenLoss | None = None
    below: Sequence[nn.Module] = ()
    above: Sequence[nn.Module] = ()
    size: int = 0
    """Bytes of a token's states."""

    def compute_states(self, rows: Batch) -> Tensor:
        """The lower blocks' output, `[rows, length, width]`, bit-identical to that in training.

        Gradients are on for this, because without them attention may use another kernel; nothing
        below the lowest adapted layer is trained, so no graph is stored.
        """
        assert self.module is not None
        inputs: list[Tensor] = []

        def record_input(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            inputs.append(hidden)
            return hidden

        with _replace_forward(self.above, record_input), torch.enable_grad():
            self.module.compute_hidden(rows)
        return inputs[0]

    @contextmanager
    def reuse_states(self, states: Tensor | None) -> Iterator[None]:
        """Inside the context, the lower blocks return these states; None: what they compute."""

        def return_states(*_: Any, **__: Any) -> Tensor:
            assert states is not None
            return states

        with _replace_forward(() if states is None else self.below, return_states):
            yield


NO_PREFIX_CACHE = PrefixCache()
"""For a model whose blocks are all adapted, or that does more between blocks."""


@contextmanager
def _replace_forward(blocks: Iterable[Any], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the blocks' `forward` inside the context."""
    originals = [(vars(block), vars(block).get("forward")) for block in blocks]
    try:
        for attributes, _ in originals:
            attributes["forward"] = forward
        yield
    finally:
        for attributes, original in originals:
            if original is None:
                del attributes["forward"]
            else:
                attributes["forward"] = original


def make_prefix_cache(module: TokenLoss, adapted: Iterable[str]) -> PrefixCache:
    """The model's blocks, split at the lowest one with an adapted layer.

    `NO_PREFIX_CACHE` if there is no lower block, or if a layer is outside all blocks.
    """
    places = [re.match(r"(.+?)\.(\d+)\.", name) for name in adapted]
    lists = {place and place[1] for place in places}
    if len(lists) != 1 or None in lists:
        return NO_PREFIX_CACHE
    blocks = module.model.get_submodule(lists.pop())
    lowest = min(int(place[2]) for place in places if place)
    if not lowest or not isinstance(blocks, nn.ModuleList):
        return NO_PREFIX_CACHE
    prefix_cache = PrefixCache(module, [*blocks[:lowest]], [*blocks[lowest:]])
    size = _measure_state_bytes(prefix_cache, module)
    return replace(prefix_cache, size=size) if size else NO_PREFIX_CACHE


def _measure_state_bytes(prefix_cache: PrefixCache, module: TokenLoss) -> int:
    """Bytes of a token's states; 0 if a text's loss with them is not bit-identical."""
    tokens = torch.tensor([[0, 1, 0, 2, 1, 3]], device=next(module.model.parameters()).device)
    one, place = torch.ones_like(tokens), torch.arange(6, device=tokens.device).unsqueeze(0)
    rows = {"tokens": tokens, "labels": tokens, "mask": one, "segment": one, "position": place}
    try:
        states = prefix_cache.compute_states(rows)
        with prefix_cache.reuse_states(states):
            recomputed = module(rows)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return 0
    fits = states.shape[:-1] == tokens.shape and torch.equal(module(rows), recomputed)
    return states.shape[-1] * states.itemsize if fits else 0
