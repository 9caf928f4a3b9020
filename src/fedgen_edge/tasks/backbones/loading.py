"""Load complete models and tokenizers from Hugging Face folders, without running their code.

Transformers randomizes weights that a folder lacks, ignores those that it does not know, and can
run Python files beside the weights. Here each of these is a one-line error.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedgen_edge.errors import ConfigError, is_out_of_memory

FAILURES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""Exceptions of transformers for files that are damaged or do not belong together."""
SAVED_MASK_PATTERN = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")
"""Suffix of the names of masks that transformers saved with GPT-2, GPT-Neo and similar models."""
MAX_NAMED_WEIGHTS = 3
"""Number of weights that a message names before it only counts them."""
UNUSUAL_TEXT = "\U000f1234 \u2603"
"""A private-use character and a snowman, which hardly any vocabulary contains."""


def describe(error: Exception, length: int = 200) -> str:
    """A library's error message in one line, with its type if the message is vague.

    Raises:
        Exception: the error itself if memory ran out, which is not a file's fault.
    """
    if is_out_of_memory(error):
        raise error
    text = " ".join(str(error).split())[:length]
    vague = not text or isinstance(error, LookupError | ArithmeticError | AttributeError)
    return f"{type(error).__name__}: {text}" if vague else text


def read_config_file(file: Path, setting: str) -> Mapping[str, Any]:
    """The values of a model's config.json.

    Args:
        file: to read.
        setting: the setting that names it, with its value, for messages.

    Raises:
        ConfigError: it is not JSON, or not a model's configuration.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{setting}: {file} is no JSON ({describe(error)}): correct it, or take another"
        ) from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ConfigError(
            f"{setting}: {file} names no model_type, so it is no model's: correct it, or take "
            "another"
        )
    return values


def check_quantization(values: Mapping[str, Any], setting: str) -> None:
    """Refuse a model with quantized weights, before loading it.

    Raises:
        ConfigError: its config.json says so.
    """
    for part in (values, values.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, Mapping) else None
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise ConfigError(
                f"{setting} is quantized ({method or 'by an unnamed method'}, in "
                "quantization_config of its config.json), which is not supported: take the model "
                "in bf16, float16 or float32, or a GGUF file of it"
            )


def check_code(values: Mapping[str, Any], config: Any, setting: str) -> None:
    """Refuse a model that needs its own Python files.

    Many folders contain code for an architecture that transformers now supports. Such a model is
    loaded without that code if its classes have the same names as those in transformers.

    Raises:
        ConfigError: the code is for another architecture.
    """
    classes = values.get("auto_map")
    if not isinstance(classes, Mapping):
        return
    model = AutoModelForCausalLM._model_mapping.get(type(config), type(None))
    known = {"AutoConfig": type(config), "AutoModelForCausalLM": model}
    for kind, transformers_class in known.items():
        name = str(classes.get(kind) or transformers_class.__name__).rpartition(".")[2]
        if name.lower() != transformers_class.__name__.lower():
            raise ConfigError(
                f"{setting} needs Python code of its own ({classes[kind]}, in auto_map of its "
                "config.json), which is never run: take a model of an architecture that "
                "transformers has"
            )


def _read_folder_config(folder: Path, setting: str) -> Mapping[str, Any]:
    """The values of a folder's config.json, checked to be those of a plain model."""
    if (folder / "adapter_config.json").is_file():  # transformers would load it into the model
        raise ConfigError(
            f"{setting} holds an adapter (adapter_config.json): give the folder of the model "
            "alone, and this one as adapter.initial"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting} has no config.json: give a model's whole folder, or another")
    values = read_config_file(folder / "config.json", setting)
    check_quantization(values, setting)
    return values


def read_config(folder: Path, setting: str) -> Any:
    """The configuration of a folder's causal language model.

    Raises:
        ConfigError: it is missing or unusable, or its model is quantized or needs code.
    """
    values = _read_folder_config(folder, setting)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAILURES as error:
        if "auto_map" in values:
            check_code(values, None, setting)
        raise ConfigError(
            f"{setting} is no causal language model here: its config.json cannot be used "
            f"({describe(error)}): correct it, or take another"
        ) from None
    check_code(values, config, setting)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{setting} is no causal language model: its type is {config.model_type}: take another"
        )
    check_text(config, setting, "vocab_size")
    return config


def check_text(config: Any, setting: str, *names: str) -> None:
    """Refuse a model whose configuration lacks these values for text.

    Raises:
        ConfigError: it contains no language model, or several, or lacks a value.
    """
    try:
        text = config.get_text_config()
        lacking = [name for name in names if not hasattr(text, name)]
    except ValueError:  # two parts read text
        lacking = [*names]
    if lacking:
        raise ConfigError(
            f"{setting}, a {config.model_type}, has no {lacking[0]} of one language model in its "
            "configuration: take another"
        )


def read_model(folder: Path, config: Any, dtype: torch.dtype, setting: str) -> Any:
    """The model of a folder, with every weight from the folder.

    Raises:
        ConfigError: weights are missing, unused, or of other sizes, or loading fails.
    """
    _check_depth(folder, config, setting)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, all at once
            output_loading_info=True,
        )
    except FAILURES as error:
        raise ConfigError(
            f"{setting} is no causal language model here ({describe(error)}): take another"
        ) from None
    model, loading = loaded
    unused = loading["unexpected_keys"] - _find_saved_masks(folder, loading["unexpected_keys"])
    check_weights({**loading, "unexpected_keys": unused}, type(model).__name__, setting)
    return model


def _check_depth(folder: Path, config: Any, setting: str) -> None:
    """Refuse more layers than the files have tensors, before the layers are allocated."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    tensors = sum(len(file.keys()) for file in _open_files(folder))
    if isinstance(layers, int) and layers > tensors > 0:
        raise ConfigError(
            f"{setting}: num_hidden_layers={layers} in its config.json is above the number of "
            f"tensors in its files, {tensors}: give the files of one model, complete"
        )


def _find_saved_masks(folder: Path, names: Collection[str]) -> set[str]:
    """The names of causal attention masks, which older transformers versions saved.

    They contain nothing trainable, and current classes recompute them.
    """
    mask_names = {name for name in names if SAVED_MASK_PATTERN.search(name)}
    masks = set()
    for file in _open_files(folder) if mask_names else ():
        for key in file.keys():  # noqa: SIM118
            name = next((n for n in mask_names if n.endswith(key) or key.endswith(n)), None)
            if name and _is_mask(file.get_tensor(key)):
                masks.add(name)
    return masks


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is a mask's fill value, or ones and zeros that hide all later tokens."""
    if tensor.ndim != 4:
        return tensor.ndim == 0
    visible = tensor != 0
    plain = visible.shape[:2] == (1, 1) and visible.shape[2] == visible.shape[3]
    return plain and bool((tensor[visible] == 1).all()) and not bool(visible.triu(1).any())


def _open_files(folder: Path) -> Iterator[Any]:
    """The safetensors files of a folder, one at a time, skipping damaged ones."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(path, "pt") as file:
            yield file


def check_weights(loading: Mapping[str, Any], kind: str, setting: str) -> None:
    """Refuse a model with weights missing from its files, or files with extra weights.

    Tied weights, and those that transformers declares as ignored, count as neither.

    Args:
        loading: transformers' `output_loading_info`.
        kind: the model's class.
        setting: the setting that names the files, with its value.

    Raises:
        ConfigError: the model and its files do not match.
    """
    sizes = [
        f"{name} ({list(in_file)} in the file, {list(in_model)} by its configuration)"
        for name, in_file, in_model in sorted(loading["mismatched_keys"])
    ]
    faults = {
        "missing": sorted(loading["missing_keys"]),
        "not used": sorted(loading["unexpected_keys"]),
        "of another size": sizes,
        "not converted": [" ".join(str(e).split()) for e in loading.get("error_msgs") or ()],
    }
    parts = [
        f"{_format_count(names)} {fault}: {format_names(names)}"
        for fault, names in faults.items()
        if names
    ]
    if parts:
        raise ConfigError(
            f"{setting}: its files are not those of a whole {kind} as its configuration says "
            f"({'; '.join(parts)}): give the files of one model, complete"
        )


def _format_count(names: list[str]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def format_names(names: Sequence[str]) -> str:
    """The first few names, in one line."""
    return ", ".join(names[:MAX_NAMED_WEIGHTS]) + (
        ", ..." if len(names) > MAX_NAMED_WEIGHTS else ""
    )


def read_tokenizer(folder: Path, setting: str) -> Any:
    """The tokenizer of a folder, checked to accept any text.

    Raises:
        ConfigError: it is missing, needs the folder's own code, or fails on unknown words.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer(UNUSUAL_TEXT)
    except Exception as error:  # the tokenizers library raises nothing narrower
        _check_tokenizer_code(folder, None, setting)
        raise ConfigError(
            f"{setting}: its tokenizer cannot be used ({describe(error)}): correct its files, or "
            "take another"
        ) from None
    _check_tokenizer_code(folder, tokenizer, setting)
    return tokenizer


def _check_tokenizer_code(folder: Path, tokenizer: Any, setting: str) -> None:
    """Refuse a tokenizer that needs the folder's own Python code, or a substitute for it."""
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        classes = values.get("auto_map") or {}
        classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
        names = [str(name).rpartition(".")[2] for name in classes or () if name]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # none, or damaged
        return
    same = {name.removesuffix("Fast") for name in names}
    if names and type(tokenizer).__name__.removesuffix("Fast") not in same:
        raise ConfigError(
            f"{setting}: its tokenizer needs Python code of its own ({names[0]}, in auto_map of "
            "its tokenizer_config.json), which is never run: take a tokenizer that transformers has"
        )
