"""Cross-entropy of each next token, in nats, without ever storing all logits."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedgen_edge.types import Batch

LOGITS = {"cpu": 2**24}
"""Number of logits in memory at once, by device type: 64 MB in float32."""
MAX_LOGITS = 2**26
"""The same for accelerators, whose matrix products need many rows."""


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy behind a frozen output layer.

    The layer's weight has no gradient, so the gradient of the hidden states can be computed with
    the logits and stored instead of them, chunk by chunk. All chunks share buffers: on a CPU,
    allocating that much memory costs more than the computation in it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Nats of the labels, float32 `[tokens]`, from `[tokens, width]` hidden states."""
        needs_gradient = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_gradient else hidden[:0]
        nats = torch.empty(len(hidden), device=hidden.device)
        rows = max(1, LOGITS.get(hidden.device.type, MAX_LOGITS) // len(weight))
        narrow = hidden.new_empty(min(rows, len(hidden)), len(weight))
        wide = narrow if narrow.dtype == torch.float32 else narrow.float()
        for at in range(0, len(hidden), rows):
            chunk, remaining = slice(at, at + rows), slice(len(hidden) - at)
            low = torch.mm(hidden[chunk], weight.T, out=narrow[remaining])
            high = low if wide is narrow else wide[remaining].copy_(low)
            label, top = labels[chunk].unsqueeze(1), high.amax(1, keepdim=True)
            label_logit = high.gather(1, label)
            total = high.sub_(top).exp_().sum(1, keepdim=True)
            nats[chunk] = (total.log() + top - label_logit).squeeze(1)
            if needs_gradient:
                high.scatter_add_(1, label, -total).div_(total)
                torch.mm(low if wide is narrow else low.copy_(high), weight, out=grad[chunk])
        if needs_gradient:
            ctx.save_for_backward(grad)
        return nats

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """The stored gradient, times the gradient of each token's nats."""
        (grad,) = ctx.saved_tensors
        return (grad * outer[0].unsqueeze(1)).to(grad.dtype), None, None


class TokenLoss(nn.Module):
    """A causal language model as a function from a packed batch to the nats of its labels."""

    def __init__(self, model: Any, *, plain_head: bool | None = None) -> None:
        super().__init__()
        self.model = model
        self.plain_head = _is_plain_head(model) if plain_head is None else plain_head

    def forward(self, batch: Batch) -> Float[Tensor, "rows length"]:
        """Nats of each label, zero where the mask is zero.

        Documents packed in one row do not see each other: attention stays inside a segment, and
        positions restart.
        """
        # padding is computed and then masked: removing its rows first would give every batch a new
        # shape, for which a CPU compiles a kernel and a GPU synchronizes
        nats = self._compute_nats(batch, batch["labels"].flatten().long())
        return torch.where(batch["mask"].bool(), nats.view_as(batch["mask"]), 0.0)

    def compute_hidden(self, batch: Batch) -> Float[Tensor, "rows length width"]:
        """Hidden states of the same batch before the output layer."""
        return _get_trunk(self.model)(**_make_model_inputs(batch, self.dtype)).last_hidden_state

    def logits(self, batch: Batch) -> Float[Tensor, "rows length vocabulary"]:
        """Logits of each next token, computed on the same inputs."""
        if self.plain_head:
            return self.model.get_output_embeddings()(self.compute_hidden(batch))
        return self.model(**_make_model_inputs(batch, self.dtype)).logits

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return next(self.model.parameters()).dtype

    def _compute_nats(self, batch: Batch, labels: Tensor) -> Tensor:
        if not self.plain_head:
            logits = self.logits(batch).flatten(0, 1)
            return F.cross_entropy(logits.float(), labels, reduction="none")
        hidden = self.compute_hidden(batch).flatten(0, 1)
        weight = self.model.get_output_embeddings().weight
        if weight.requires_grad:
            return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
        return FrozenHeadCrossEntropy.apply(hidden, weight, labels)  # pyright: ignore[reportReturnType]


def _make_model_inputs(batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "input_ids": batch["tokens"].int(),
        "position_ids": batch["position"].int(),
        "attention_mask": make_attention_mask(batch["segment"].int(), dtype),
        "use_cache": False,
    }


def make_attention_mask(segment: Int[Tensor, "rows length"], dtype: torch.dtype) -> Tensor:
    """The additive attention mask: zero for earlier tokens of the same segment."""
    length = segment.shape[1]
    visible = segment.unsqueeze(2) == segment.unsqueeze(1)
    visible &= torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    blocked = torch.zeros(visible.shape, dtype=dtype, device=segment.device)
    return blocked.masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _get_trunk(model: Any) -> Any:
    """The model below the output layer; in Llama 4 it is `model`, despite another prefix."""
    return getattr(model, model.base_model_prefix, None) or model.model


@torch.no_grad()
def _is_plain_head(model: Any) -> bool:
    """Whether logits are only the output layer's product (some models scale or cap them)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    probe = torch.arange(4, device=head.weight.device).unsqueeze(0)
    try:
        hidden = _get_trunk(model)(probe, use_cache=False).last_hidden_state
    except (AttributeError, TypeError):
        return False
    return torch.equal(head(hidden), model(probe, use_cache=False).logits)
