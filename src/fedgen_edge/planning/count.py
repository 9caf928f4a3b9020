"""Count the memory and work of torch code by running it on tensors without values.

Fake tensors have shapes, types and lifetimes, and take no memory: the training code runs unchanged,
with autograd, and each operation is intercepted. A tensor's bytes count from the operation that
creates it until nothing references it.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fedgen_edge.tasks.language.experts import run_operation

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class OperationCost:
    """The total cost of operations."""

    ops: float
    """Operations that compute, which excludes views."""
    products: float
    """Those of them that are matrix products."""
    flops: float
    """FLOPs of the products: a multiplication and an addition are two."""
    traffic: float
    """Bytes that the operations read and write."""

    def add(self, other: "OperationCost") -> "OperationCost":
        """Return the sum of both costs."""
        return OperationCost(
            self.ops + other.ops,
            self.products + other.products,
            self.flops + other.flops,
            self.traffic + other.traffic,
        )


ZERO_COST = OperationCost(0.0, 0.0, 0.0, 0.0)


@dataclass
class StageCount:
    """The count of one stage."""

    peak: int = 0
    """Peak bytes that were live at once."""
    cost: OperationCost = ZERO_COST


class OperationCounter(TorchDispatchMode):
    """Count live bytes and work inside the context, stage by stage.

    A number read from a fake tensor is one: an optimizer reads its step.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        """Start with nothing live; the storages of the excluded tensors are not counted."""
        super().__init__()
        self.live_bytes = 0
        self.stage = ""
        self.stages: dict[str, StageCount] = defaultdict(StageCount)
        self._finalizers: dict[int, Any] = {}
        for tensor in excluded:
            self._track_storage(tensor, 0)

    def enter(self, stage: str) -> None:
        """Count what follows in this stage; what is live now is live in it."""
        self.stage = stage
        self._update_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        if func is aten._local_scalar_dense.default and isinstance(inputs[0], FakeTensor):
            return 1
        if inputs and not any(isinstance(t, FakeTensor) for t in inputs):
            with unset_fake_temporarily():  # a batch's marks, which code reads
                return func(*args, **(kwargs or {}))
        out = run_operation(func, args, kwargs or {})
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in outputs:
            self._track_storage(tensor, tensor.untyped_storage().nbytes())
        self._update_peak()
        if not func.is_view and func.namespace != "prim":  # prim only reads the device
            size = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
            flops = float(_count_flops(func, args, kwargs or {}, out))
            stage_count = self.stages[self.stage]
            stage_count.cost = stage_count.cost.add(
                OperationCost(1.0, float(flops > 0), flops, float(size))
            )
        return out

    def _update_peak(self) -> None:
        stage_count = self.stages[self.stage]
        stage_count.peak = max(stage_count.peak, self.live_bytes)

    def _track_storage(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._finalizers:
            return
        self.live_bytes += size
        self._finalizers[key] = weakref.finalize(storage, self._release_storage, key, size)
        self._finalizers[key].atexit = False

    def _release_storage(self, key: int, size: int) -> None:
        del self._finalizers[key]
        self.live_bytes -= size


def _count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    name = packet.__name__
    if "scaled_dot_product" in name or "flash_attention" in name or "grouped_mm" in name:
        return _count_unregistered_flops(
            name, [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        )
    return 0


def _count_unregistered_flops(name: str, shapes: list[tuple[int, ...]]) -> int:
    """Count FLOPs that torch's counter does not know: attention on a CPU, and experts."""
    if "grouped_mm" in name:
        (*_, rows, inner), (*_, columns) = shapes[0], shapes[1]
        return 2 * rows * inner * columns
    is_backward = "backward" in name
    query, key = shapes[1 if is_backward else 0], shapes[2 if is_backward else 1]
    batch, heads, rows, width = query
    return (5 if is_backward else 2) * 2 * batch * heads * rows * key[-2] * width


def make_fake_mode() -> FakeTensorMode:
    """Make a mode in which tensors have no values, as if on a CPU."""
    return FakeTensorMode(allow_non_fake_inputs=True)
