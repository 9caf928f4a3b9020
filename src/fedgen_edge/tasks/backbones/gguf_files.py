"""Convert a GGUF file into a Hugging Face folder that computes the same results."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.backbones import whole_models
from fedgen_edge.tasks.backbones.loading import check_weights, describe, format_names

VERSION = 3
"""Version of the conversion; cached folders of other versions are not used."""
LINEAR_SCALING_KEYS = {"scale_linear"} | {
    f"scaling.{key}" for key in ("type", "factor", "finetuned", "original_context_length")
}
"""Keys of linear scaling of rotary positions, which needs only a factor."""
FREQUENCY_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""Tensors by which rotary frequencies are divided."""
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all models of Llama 3.1 and later share."""


def is_gguf(path: Path) -> bool:
    """Whether a file's name ends as GGUF files do, in either case."""
    return path.suffix.lower() == ".gguf"


def convert(file: Path, setting: str, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into a folder.

    Args:
        file: the file to read; no file beside it is read.
        setting: the setting that names it, with its value.
        folder: the folder to fill.

    Raises:
        ConfigError: it is damaged, not a language model, or has parts that cannot be converted.
    """
    model, tokenizer, scaling = _read_and_check(file, setting)
    values = {k: v for k, v in model.config.to_dict().items() if k not in DROPPED_KEYS} | scaling
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    whole_models.add_legacy_fields(folder)


def _read_and_check(file: Path, setting: str) -> tuple[Any, Any, dict[str, Any]]:
    """A file's model, tokenizer, and the position scaling that its configuration lacks."""
    with TemporaryDirectory() as place:  # transformers reads files beside it
        link = Path(place) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            model, tokenizer, loading = _load_file(link)
            reader = GGUFReader(link)
        except Exception as error:  # the GGUF and tokenizers libraries raise nothing narrower
            reason = describe(error).replace(str(link), file.name)
            raise ConfigError(
                f"{setting} cannot be read as a GGUF language model ({reason}): fetch it "
                "again, or give another"
            ) from None
        check_weights(loading, type(model).__name__, setting)
        _check_all_is_used(reader, model, setting)
        return model, tokenizer, _read_rope_scaling(reader, model.config, setting)


DROPPED_KEYS = {"quantization_config", "_name_or_path"}
"""Values of a configuration about the file that it was read from."""


def _load_file(file: Path) -> tuple[Any, Any, Mapping[str, Any]]:
    """The model in float32, the tokenizer, and transformers' loading information.

    The configuration is read first: its reader respects the file's end, whatever a header claims.
    """
    from_file = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(file.parent, **from_file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **from_file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **from_file,
    )
    model, loading = loaded
    return model, tokenizer, loading


def _check_all_is_used(reader: GGUFReader, model: Any, setting: str) -> None:
    """Refuse a file with more weights than the model: transformers ignores what it does not map.

    Values are counted, because one tensor there may be several here. Factors of rotary frequencies
    are not weights; they are checked with the rest of their scaling.
    """
    tensors = {t.name: int(t.n_elements) for t in reader.tensors if t.name not in FREQUENCY_TENSORS}
    in_model = {t.data_ptr(): t.numel() for t in model.state_dict().values()}
    if sum(tensors.values()) == sum(in_model.values()):
        return
    names = get_tensor_name_map(_get_architecture(reader), model.config.num_hidden_layers)
    used = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    unused = [name for name in tensors if name not in used] or ["some values"]
    raise ConfigError(
        f"{setting} holds weights that a {type(model).__name__} as its header says does not use "
        f"({len(unused)}: {format_names(unused)}): give another file, or the model's Hugging Face "
        "folder"
    )


def _get_architecture(reader: GGUFReader) -> MODEL_ARCH:
    name = _read_scalars(reader)["general.architecture"]
    return next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == name)


def _read_scalars(reader: GGUFReader) -> dict[str, Any]:
    """The scalars of a header."""
    return {k: f.contents() for k, f in reader.fields.items() if len(f.data) == 1}


def _read_rope_scaling(reader: GGUFReader, config: Any, setting: str) -> dict[str, Any]:
    """The scaling of rotary positions as configuration values; transformers does not read it.

    Raises:
        ConfigError: the scaling cannot be converted.
    """
    header = _read_scalars(reader)
    prefix = f"{header['general.architecture']}.rope."
    keys = {k.removeprefix(prefix): v for k, v in header.items() if k.startswith(f"{prefix}scal")}
    kind = keys.get("scaling.type", "linear")  # llama.cpp's default
    factor = keys.get("scaling.factor") or keys.get("scale_linear") or 1.0
    frequencies = {
        t.name: torch.tensor(t.data) for t in reader.tensors if t.name in FREQUENCY_TENSORS
    }
    linear = kind == "linear" and not keys.keys() - LINEAR_SCALING_KEYS
    scales = kind != "none" and not (linear and factor == 1)
    if not scales and not frequencies:
        return {}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope == "default" and linear and not frequencies:
        scaling = {**config.rope_parameters, "rope_type": "linear", "factor": float(factor)}
    elif rope == "default" and not scales and [*frequencies] == ["rope_freqs.weight"]:
        scaling = _match_llama3(config, frequencies["rope_freqs.weight"])
    else:
        scaling = None
    if not scaling:
        ways = ", ".join([*(f"rope.{k}={v}" for k, v in keys.items()), *frequencies])
        raise ConfigError(
            f"{setting} scales rotary positions in a way that cannot be carried over ({ways}): "
            "give the model's Hugging Face folder"
        )
    return {"rope_parameters": scaling}


def _match_llama3(config: Any, divisors: Tensor) -> dict[str, Any] | None:
    """Llama 3's scaling, if it divides rotary frequencies by these numbers; otherwise None.

    Source: llama.cpp, convert_hf_to_gguf.py, which writes these numbers for Llama 3.1 and later.
    """
    rope = {**config.rope_parameters, **LLAMA3_SCALING, "factor": float(divisors.max())}
    scaled = AutoConfig.for_model(**{**config.to_dict(), "rope_parameters": rope})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(divisors)) / len(divisors))
    if frequencies.shape != divisors.shape:
        return None
    return rope if torch.allclose(plain / divisors, frequencies, atol=0) else None
