"""Models and tokenizers from Hugging Face folders: whole, and without code of the folder's own.

Transformers draws at random what a folder lacks, leaves out what it does not know, and can run
Python files that lie beside the weights. Here each of these is a mistake of one line.
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
"""What transformers raises where a folder's files are damaged or do not belong together."""
SAVED_MASK_PATTERN = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")
"""Ends the names of masks that transformers saved with GPT-2, GPT-Neo and their like."""
MAX_NAMED_WEIGHTS = 3
"""Weights that a message names; of more it says how many."""
UNUSUAL_TEXT = "\U000f1234 \u2603"
"""A private character and a snowman: words that hardly any vocabulary holds."""


def describe(error: Exception, length: int = 200) -> str:
    """What a library says of a failure, in one line; with its type where that says the most.

    Raises:
        Exception: the failure itself where there was no memory left, for which no file is to blame.
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
        setting: that names it, with its value, as messages begin.

    Raises:
        ConfigError: it is no JSON, or no model's.
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
    """Refuse a model whose weights are quantized, before anything of it is loaded.

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
    """Refuse a model that is computed by Python files of its own.

    Many folders carry code of an architecture that transformers has since learnt. Such a model is
    loaded without that code if its classes have the names of transformers' own.

    Raises:
        ConfigError: the code is another architecture's.
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
    """The values of a folder's config.json, which are those of a plain model."""
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
        ConfigError: there is none that can be used; or its model is quantized, or needs code.
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
    """Refuse a model whose configuration does not say these things of text.

    Raises:
        ConfigError: it has none of a language model within it, or several, or lacks a value.
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
    """The model of a folder, every weight of which is the folder's.

    Raises:
        ConfigError: weights are missing, not used, or of other sizes; or it cannot be loaded.
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
            ignore_mismatched_sizes=True,  # they are told below, all of them
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
    """Refuse more layers than the files have tensors before they are all made."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    tensors = sum(len(file.keys()) for file in _open_files(folder))
    if isinstance(layers, int) and layers > tensors > 0:
        raise ConfigError(
            f"{setting}: num_hidden_layers={layers} in its config.json is above the number of "
            f"tensors in its files, {tensors}: give the files of one model, complete"
        )


def _find_saved_masks(folder: Path, names: Collection[str]) -> set[str]:
    """Those of these names that are masks of causal attention, which transformers once saved.

    They hold nothing that a model learns, and today's classes make them anew.
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
    """Whether a tensor is the number that hides, or ones and zeros that show no later token."""
    if tensor.ndim != 4:
        return tensor.ndim == 0
    visible = tensor != 0
    plain = visible.shape[:2] == (1, 1) and visible.shape[2] == visible.shape[3]
    return plain and bool((tensor[visible] == 1).all()) and not bool(visible.triu(1).any())


def _open_files(folder: Path) -> Iterator[Any]:
    """The safetensors files of a folder, one after the other; those that are damaged aside."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(path, "pt") as file:
            yield file


def check_weights(loading: Mapping[str, Any], kind: str, setting: str) -> None:
    """Refuse a model of which not every weight was in its files, or whose files hold more.

    Weights that are tied to others, and what transformers itself declares to be left out, are
    neither missing nor too many.

    Args:
        loading: what transformers says of it, by `output_loading_info`.
        kind: class of the model.
        setting: that names the files, with its value.

    Raises:
        ConfigError: they do not belong together.
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
    """Some of them, in one line."""
    return ", ".join(names[:MAX_NAMED_WEIGHTS]) + (
        ", ..." if len(names) > MAX_NAMED_WEIGHTS else ""
    )


def read_tokenizer(folder: Path, setting: str) -> Any:
    """The tokenizer of a folder, which reads any text.

    Raises:
        ConfigError: there is none, it needs code of the folder's own, or it fails at words that it
            does not know.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer(UNUSUAL_TEXT)
    except Exception as error:  # the library of tokenizers raises nothing narrower
        _check_tokenizer_code(folder, None, setting)
        raise ConfigError(
            f"{setting}: its tokenizer cannot be used ({describe(error)}): correct its files, or "
            "take another"
        ) from None
    _check_tokenizer_code(folder, tokenizer, setting)
    return tokenizer


def _check_tokenizer_code(folder: Path, tokenizer: Any, setting: str) -> None:
    """Refuse a tokenizer that is Python code of the folder's own, and what stands in for it."""
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
