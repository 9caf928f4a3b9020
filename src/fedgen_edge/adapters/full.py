"""The full model as the adapter, which full-model FedAvg trains."""

from dataclasses import dataclass

from torch import Generator, Tensor, nn
from torch.func import functional_call

from fedgen_edge.types import Leaves


@dataclass(frozen=True)
class Full:
    """Every weight of one model; tied weights appear once.

    Its leaves have no client axis: clients train one at a time.
    """

    model: nn.Module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf."""
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    def init(self, _rng: Generator) -> Leaves:
        """The pretrained weights in float32; no random numbers are drawn."""
        return {n: p.detach().float().clone().cpu() for n, p in self.model.named_parameters()}

    def call(
        self, module: nn.Module, leaves: Leaves, batch: object, _seed: Tensor | None
    ) -> Tensor:
        """The module's output on the batch, computed with these leaves; dropout is not applied.

        Args:
            module: its attribute `model` is the model.
            leaves: one model's weights.
            batch: the module's argument.
        """
        dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        parameters = {f"model.{name}": leaf.to(dtypes[name]) for name, leaf in leaves.items()}
        return functional_call(module, parameters, (batch,), tie_weights=True)
