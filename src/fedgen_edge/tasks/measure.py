"""The number by which a task's models are judged, and its words; lower is better."""

import math
from typing import NamedTuple

Number = int | float


class Measure(NamedTuple):
    """How held-out sums become the number that tables show."""

    name: str
    """Of the number: perplexity, ..."""
    items: str
    """What a sum counts: tokens, images, ..."""
    unit: str
    """Of the mean loss: nats a token, ..."""
    material: str
    """What is held out: text, images, ..."""
    scarce_items: int
    """Items from which a client can hardly learn, and is easily overfitted to."""
    loss_spread: float
    """About how much one item's loss varies: in nats where `exponential`, else as a share of it."""
    exponential: bool = False
    """The number is exp of the mean loss, not the loss itself."""
    values_per_item: int = 1
    """Items that one true entry of a batch's `mask` stands for: of a picture, its values."""

    training_loss: str = ""
    """What training lowers, where that is not the mean loss of held-out items."""

    def compute(self, total: Number, count: Number) -> float:
        """The number, from a sum and its count; nan of nothing, infinite beyond floats."""
        if count <= 0:
            return math.nan
        mean = total / count
        if not self.exponential:
            return mean
        return math.inf if mean > 700 else math.exp(mean)

    def log_level(self, loss: Number) -> Number:
        """The number's logarithm for a mean loss: differences of it are shares of the number."""
        return loss if self.exponential or not loss > 0 else math.log(loss)
