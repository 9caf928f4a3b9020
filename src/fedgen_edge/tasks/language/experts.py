"""Shapes of products of a mixture's experts on tensors without values, in any dtype.

torch multiplies them in float32 and bf16, but infers the product's shape only in bf16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


def run_operation(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of one of torch's operations, including experts' products in any dtype."""
    if func is not torch.ops.aten._grouped_mm.default or not _has_no_values(args[0]):
        return func(*args, **kwargs)
    low = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return func(*low, **kwargs).to(args[0].dtype)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class AnyDtypeExperts(TorchDispatchMode):
    """A mode in which experts' products have shapes in any dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return run_operation(func, args, kwargs or {})
