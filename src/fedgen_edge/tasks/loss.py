"""Nats of each next token, without ever holding all logits."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedgen_edge.types import Batch

LOGITS = {"cpu": 2**24}
"""Logits that are held at once, by the type of the device: 64 MB in float32."""
MOST_LOGITS = 2**26
"""The same, on accelerators, whose products want many rows."""


class NextToken(torch.autograd.Function):
    """Cross-entropy behind a frozen output layer.

    The layer's weight has no gradient, so the gradient of the hidden states is known as soon as
    the logits are: it is kept instead of them, chunk by chunk. All chunks share their buffers: new
    memory of that size costs a processor more than what is done in it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Nats of the labels, float32 `[tokens]`, from `[tokens, width]` hidden states."""
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else hidden[:0]
        nats = torch.empty(len(hidden), device=hidden.device)
        rows = max(1, LOGITS.get(hidden.device.type, MOST_LOGITS) // len(weight))
        narrow = hidden.new_empty(min(rows, len(hidden)), len(weight))
        wide = narrow if narrow.dtype == torch.float32 else narrow.float()
        for at in range(0, len(hidden), rows):
            own, left = slice(at, at + rows), slice(len(hidden) - at)
            low = torch.mm(hidden[own], weight.T, out=narrow[left])
            high = low if wide is narrow else wide[left].copy_(low)
            label, top = labels[own].unsqueeze(1), high.amax(1, keepdim=True)
            said = high.gather(1, label)
            total = high.sub_(top).exp_().sum(1, keepdim=True)
            nats[own] = (total.log() + top - said).squeeze(1)
            if wanted:
                high.scatter_add_(1, label, -total).div_(total)
                torch.mm(low if wide is narrow else low.copy_(high), weight, out=grad[own])
        if wanted:
            ctx.save_for_backward(grad)
        return nats

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """The kept gradient, times that of each token's nats."""
        (grad,) = ctx.saved_tensors
        return (grad * outer[0].unsqueeze(1)).to(grad.dtype), None, None


class TokenLoss(nn.Module):
    """A causal language model as a function from a packed batch to the nats of its labels."""

    def __init__(self, model: Any, *, plain_head: bool | None = None) -> None:
        super().__init__()
        self.model = model
        self.plain_head = _head_is_all(model) if plain_head is None else plain_head

    def forward(self, batch: Batch) -> Float[Tensor, "rows length"]:
        """Nats of each label, zero where the mask is.

        Documents packed in one row do not see each other: attention stays inside a segment, and
        positions begin anew.
        """
        # padding is judged too, and then left out: with its rows taken out first, every batch would
        # bring a new shape, for which a processor compiles a kernel and a GPU waits to learn it
        nats = self._nats(batch, batch["labels"].flatten().long())
        return torch.where(batch["mask"].bool(), nats.view_as(batch["mask"]), 0.0)

    def read(self, batch: Batch) -> Float[Tensor, "rows length width"]:
        """What the model makes of the same batch, before its output layer."""
        return _trunk(self.model)(**_inputs(batch, self.dtype)).last_hidden_state

    def logits(self, batch: Batch) -> Float[Tensor, "rows length vocabulary"]:
        """Of each next token, computed on the same inputs."""
        if self.plain_head:
            return self.model.get_output_embeddings()(self.read(batch))
        return self.model(**_inputs(batch, self.dtype)).logits

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arithmetic."""
        return next(self.model.parameters()).dtype

    def _nats(self, batch: Batch, labels: Tensor) -> Tensor:
        if not self.plain_head:
            logits = self.logits(batch).flatten(0, 1)
            return F.cross_entropy(logits.float(), labels, reduction="none")
        hidden = self.read(batch).flatten(0, 1)
        weight = self.model.get_output_embeddings().weight
        if weight.requires_grad:
            return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
        return NextToken.apply(hidden, weight, labels)  # pyright: ignore[reportReturnType]


def _inputs(batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "input_ids": batch["tokens"].int(),
        "position_ids": batch["position"].int(),
        "attention_mask": attention(batch["segment"].int(), dtype),
        "use_cache": False,
    }


def attention(segment: Int[Tensor, "rows length"], dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores: zero for earlier tokens of the same segment."""
    length = segment.shape[1]
    seen = segment.unsqueeze(2) == segment.unsqueeze(1)
    seen &= torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    blocked = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
    return blocked.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _trunk(model: Any) -> Any:
    """What is below the output layer; Llama 4 has it as `model`, whatever its prefix says."""
    return getattr(model, model.base_model_prefix, None) or model.model


@torch.no_grad()
def _head_is_all(model: Any) -> bool:
    """Whether logits are just the output layer's product (some models scale or cap them)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    probe = torch.arange(4, device=head.weight.device).unsqueeze(0)
    try:
        hidden = _trunk(model)(probe, use_cache=False).last_hidden_state
    except (AttributeError, TypeError):
        return False
    return torch.equal(head(hidden), model(probe, use_cache=False).logits)
