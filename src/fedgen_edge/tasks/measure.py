"""A task's metric and its wording; lower is better."""

import math
from typing import NamedTuple

Number = int | float


class Measure(NamedTuple):
    """How held-out sums become the metric that tables show."""

    name: str
    """The metric's name: perplexity, ..."""
    items: str
    """What a sum counts: tokens, images, ..."""
    unit: str
    """Unit of the mean loss: nats a token, ..."""
    material: str
    """The kind of held-out data: text, images, ..."""
    scarce_items: int
    """Number of items from which a client can hardly learn, and easily overfits."""
    loss_spread: float
    """Approximate spread of one item's loss: in nats if `exponential`, otherwise relative to it."""
    exponential: bool = False
    """Whether the metric is exp of the mean loss, not the loss itself."""
    values_per_item: int = 1
    """Items per true entry of a batch's `mask`: for an image, the number of its values."""

    training_loss: str = ""
    """The training loss, if it is not the mean loss of held-out items."""

    def compute(self, total: Number, count: Number) -> float:
        """The metric from a sum and its count; nan if the count is zero, infinite on overflow."""
        if count <= 0:
            return math.nan
        mean = total / count
        if not self.exponential:
            return mean
        return math.inf if mean > 700 else math.exp(mean)

    def log_level(self, loss: Number) -> Number:
        """The metric's logarithm for a mean loss: its differences are relative changes."""
        return loss if self.exponential or not loss > 0 else math.log(loss)
