"""The whole model as the adapter: what full-model FedAvg trains."""

from dataclasses import dataclass

from torch import Generator, Tensor, nn
from torch.func import functional_call

from fedgen_edge.types import Leaves


@dataclass(frozen=True)
class Full:
    """Every weight of one model, tied ones once.

    Its leaves have no axis of clients: one client at a time.
    """

    model: nn.Module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf."""
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    def init(self, rng: Generator) -> Leaves:
        """The pretrained weights in float32; nothing is drawn."""
        del rng
        return {n: p.detach().float().clone().cpu() for n, p in self.model.named_parameters()}

    def call(self, module: nn.Module, leaves: Leaves, batch: object, seed: Tensor | None) -> Tensor:
        """The module's output on the batch, computed with these leaves.

        Args:
            module: holds the model as its attribute `model`.
            leaves: one model's.
            batch: the module's argument.
            seed: unused: nothing is dropped out of a full model.
        """
        del seed
        dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        parameters = {f"model.{name}": leaf.to(dtypes[name]) for name, leaf in leaves.items()}
        return functional_call(module, parameters, (batch,), tie_weights=True)
