"""Compile a language model's blocks of layers with torch for training."""

import os
import shutil
import sys
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedgen_edge.errors import ConfigError


def compile_blocks(model: nn.Module) -> None:
    """Have torch compile each block of layers, in place, when it first trains.

    Blocks of one kind share compiled code, for batches of any size. Passes without gradients
    (validation, tests, samples) are not compiled: each of their many shapes would be.

    Raises:
        ConfigError: this machine has no compiler for its CPU, or the model has no such blocks.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if next(model.parameters()).device.type == "cpu" and not shutil.which(compiler):
        raise ConfigError(
            f"engine.compile=true needs a C++ compiler, and {compiler} is not found: install it, "
            "name another in CXX, or leave compile out"
        )
    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(
            "engine.compile=true: this backbone has no blocks to compile: leave it out"
        )
    for block in blocks:
        _compile_block(block)


def _compile_block(block: Any) -> None:
    eager_forward, compiled_forward = block.forward, torch.compile(block.forward, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled_forward if torch.is_grad_enabled() else eager_forward)(*args, **kwargs)

    block.forward = forward
