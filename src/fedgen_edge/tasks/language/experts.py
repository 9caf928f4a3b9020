"""Products of a mixture's experts on tensors without values, in any type.

torch multiplies them in float32 as in bf16, but tells the shape of the product in bf16 alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


def run_operation(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of one of torch's operations; experts' products in any type are among them."""
    if func is not torch.ops.aten._grouped_mm.default or not _has_no_values(args[0]):
        return func(*args, **kwargs)
    low = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return func(*low, **kwargs).to(args[0].dtype)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class AnyDtypeExperts(TorchDispatchMode):
    """Within it, experts' products have shapes in any type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return run_operation(func, args, kwargs or {})
