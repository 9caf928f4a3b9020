"""What a piece of torch code asks of a machine, counted as it runs on tensors without values.

Fake tensors have shapes, types and lives, and take no memory: the code that trains runs as it is,
with autograd, and each operation is seen on its way. A tensor's bytes count from the operation that
makes it until nothing holds it.
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

from fedgen_edge.tasks.experts import run_operation

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """What operations ask for, all together."""

    ops: float
    """Operations that compute: views are none."""
    products: float
    """Those of them that are products of matrices."""
    flops: float
    """Of the products: a multiplication and an addition are two."""
    traffic: float
    """Bytes that the operations read and write."""

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        return Cost(
            self.ops + other.ops,
            self.products + other.products,
            self.flops + other.flops,
            self.traffic + other.traffic,
        )


NOTHING = Cost(0.0, 0.0, 0.0, 0.0)


@dataclass
class Seen:
    """The count of one stage."""

    peak: int = 0
    """Most bytes that were live at once."""
    cost: Cost = NOTHING


class Counter(TorchDispatchMode):
    """Counts live bytes and work within it, stage by stage.

    A number that is asked of a fake tensor is one: an optimiser asks for its step.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Begin with none live; the storages of known tensors count for nothing."""
        super().__init__()
        self.live = 0
        self.stage = ""
        self.stages: dict[str, Seen] = defaultdict(Seen)
        self._holds: dict[int, Any] = {}
        for tensor in known:
            self._hold(tensor, 0)

    def enter(self, stage: str) -> None:
        """What comes next is of this stage; what is live now is live in it."""
        self.stage = stage
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        told = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        if func is aten._local_scalar_dense.default and isinstance(told[0], FakeTensor):
            return 1
        if told and not any(isinstance(t, FakeTensor) for t in told):
            with unset_fake_temporarily():  # marks of a batch, which code looks at
                return func(*args, **(kwargs or {}))
        out = run_operation(func, args, kwargs or {})
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._hold(tensor, tensor.untyped_storage().nbytes())
        self._note()
        if not func.is_view and func.namespace != "prim":  # which asks for a device
            size = sum(t.numel() * t.element_size() for t in (*told, *made))
            flops = float(_flops(func, args, kwargs or {}, out))
            seen = self.stages[self.stage]
            seen.cost = seen.cost.plus(Cost(1.0, float(flops > 0), flops, float(size)))
        return out

    def _note(self) -> None:
        seen = self.stages[self.stage]
        seen.peak = max(seen.peak, self.live)

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._holds:
            return
        self.live += size
        self._holds[key] = weakref.finalize(storage, self._let_go, key, size)
        self._holds[key].atexit = False

    def _let_go(self, key: int, size: int) -> None:
        del self._holds[key]
        self.live -= size


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    name = packet.__name__
    if "scaled_dot_product" in name or "flash_attention" in name or "grouped_mm" in name:
        return _others(name, [tuple(a.shape) for a in args if isinstance(a, Tensor)])
    return 0


def _others(name: str, shapes: list[tuple[int, ...]]) -> int:
    """Of products that torch's counter does not know: attention on a processor, and of experts."""
    if "grouped_mm" in name:
        (*_, rows, inner), (*_, columns) = shapes[0], shapes[1]
        return 2 * rows * inner * columns
    back = "backward" in name
    query, key = shapes[1 if back else 0], shapes[2 if back else 1]
    batch, heads, rows, width = query
    return (5 if back else 2) * 2 * batch * heads * rows * key[-2] * width


def unreal() -> FakeTensorMode:
    """Within it, tensors are made without values, as if on a processor."""
    return FakeTensorMode(allow_non_fake_inputs=True)
