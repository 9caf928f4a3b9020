"""Tiny language models in folders, whole and damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedgen_edge.config import Backbone
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.backbones.pretrained import LoadedModel

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.arange(2, 40).unsqueeze(0)


def llama(**shape: Any) -> LlamaForCausalLM:
    """A random Llama over bytes."""
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model and a tokenizer of bytes in a folder."""
    model.save_pretrained(folder)
    for file in pretrained._make_tiny().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def change_json(file: Path, **values: Any) -> None:
    """Write other values into a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write other weights into a folder."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def load(path: Path) -> LoadedModel:
    """The backbone, as a run loads it."""
    return pretrained.load(Backbone(path=str(path), precision="float32"), torch.device("cpu"))
