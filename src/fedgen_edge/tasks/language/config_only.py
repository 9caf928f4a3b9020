"""Build a language model's task from its configuration alone, on the current device.

On torch's meta device, or under fake tensors, it has every shape and no values: a model of any size
takes a second. On a CPU its weights are random.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from fedgen_edge import files
from fedgen_edge.adapters.lora import AdaptedLayer, Lora
from fedgen_edge.config import Adapter, Backbone
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import seed_global_generators
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.backbones.attention import use_grouped_attention
from fedgen_edge.tasks.backbones.gguf_files import is_gguf
from fedgen_edge.tasks.backbones.loading import (
    FAILURES,
    check_code,
    check_quantization,
    check_text,
    describe,
    read_config_file,
    read_tokenizer,
)
from fedgen_edge.tasks.backbones.pretrained import LoadedModel
from fedgen_edge.tasks.language.experts import AnyDtypeExperts
from fedgen_edge.tasks.language.families import FAMILIES, find_family
from fedgen_edge.tasks.language.loss import TokenLoss, make_attention_mask
from fedgen_edge.tasks.language.task import Language, adapt_text

CONFIG_HINT = "give a config.json, its folder, a hub id, or one of " + ", ".join(FAMILIES)


def load_config(settings: Backbone, setting: str = "backbone.path") -> Any:
    """The configuration of a backbone, without finding or reading its weights.

    Args:
        settings: the backbone's settings.
        setting: the dotted name of the setting with its path.

    Raises:
        ConfigError: there is none, transformers does not know it, or it is not for a causal
            language model.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    setting_text = f"{setting}={settings.path!r}"
    values = find_family(settings.path) or read_config_file(
        _find_config_file(settings, setting_text), setting_text
    )
    model_type = values.get("model_type")
    check_quantization(values, setting_text)
    try:
        config = make_config(values)
    except FAILURES as error:
        check_code(values, None, setting_text)
        raise ConfigError(
            f"{setting_text} has model_type={model_type!r}, or values with it, that cannot be read "
            f"({describe(error, 120)}): {CONFIG_HINT}"
        ) from None
    check_code(values, config, setting_text)
    architectures = values.get("architectures")
    architectures = [str(name) for name in architectures] if isinstance(architectures, list) else []
    model = AutoModelForCausalLM._model_mapping.get(type(config), None)
    causal_names = {"CausalLM", "LMHead", getattr(model, "__name__", "CausalLM")}
    is_causal = not architectures or any(
        word in name for name in architectures for word in causal_names
    )
    if model is None or not is_causal:
        raise ConfigError(
            f"{setting_text}, a {model_type} for {architectures or 'other tasks'}, is no causal "
            "language model: take "
            "another"
        )
    check_text(config, setting_text, "vocab_size", "num_hidden_layers")
    return config


def make_config(shape: Mapping[str, Any]) -> Any:
    """The configuration with these values, and transformers' defaults for the others."""
    return AutoConfig.for_model(**shape)


def _find_config_file(settings: Backbone, setting_text: str) -> Path:
    path = Path(settings.path)
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = [file.name for file in sorted(path.iterdir()) if is_gguf(file)]
        advice = f"give the file itself, {path / ggufs[0]}" if ggufs else CONFIG_HINT
        raise ConfigError(f"{setting_text} has no config.json: {advice}")
    if path.suffix == ".json" and not path.is_dir():
        return path
    if settings.path == "tiny" or settings.path.startswith("package:") or is_gguf(path):
        return pretrained.find_folder(settings) / "config.json"
    if path.is_dir():
        return path / "config.json"
    if "/" not in settings.path or path.is_absolute() or settings.path.startswith("."):
        raise ConfigError(f"{setting_text} is no model that is known: {CONFIG_HINT}")
    try:
        return Path(hf_hub_download(settings.path, "config.json", revision=settings.revision))
    except (HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{setting_text} was not found ({reason}): {CONFIG_HINT}") from None


def fresh(path: str, backbone: Backbone) -> Path:
    """The folder of an untrained language model, identical on every machine.

    Args:
        path: the path of its configuration, as for `fedgen plan`; the tokenizer's vocabulary size
            and special tokens replace the configuration's.
        backbone: the backbone that supplies the tokenizer; its weights are not read.

    Raises:
        ConfigError: it is not for a causal language model, or the backbone has no tokenizer.
    """
    path = str(files.find_recipe(path)) if path.endswith(".json") else path
    config = load_config(Backbone(path=path), "pretrain.config").get_text_config()
    folder = pretrained.find_folder(backbone)
    tokenizer = read_tokenizer(folder, f"backbone.path={backbone.path!r}")
    if not tokenizer("a word")["input_ids"]:
        raise ConfigError(
            f"backbone.path={backbone.path!r} has no tokenizer that tells words: give a folder or "
            "a hub id with one"
        )
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in SPECIAL_TOKENS}
    config.update({"vocab_size": len(tokenizer), **marks})
    tokenizer_files = [
        file for file in sorted(folder.iterdir()) if file.suffix in TOKENIZER_SUFFIXES
    ]
    hash_inputs = [config.to_json_string(use_diff=False), *map(files.digest, tokenizer_files)]
    name = hashlib.sha256(json.dumps(hash_inputs).encode()).hexdigest()[:16]
    return pretrained.fill_cache(f"fresh-{name}", partial(_write_fresh, config, tokenizer))


SPECIAL_TOKENS = ("bos", "eos", "pad")
TOKENIZER_SUFFIXES = {".json", ".model", ".txt"}
"""Suffixes of a tokenizer's files."""


def _write_fresh(config: Any, tokenizer: Any, folder: Path) -> None:
    try:
        with seed_global_generators("fresh"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"pretrain.config: no {config.model_type} has this shape ({describe(error, 120)}): "
            "correct it"
        ) from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_layers(config: Any) -> int:
    """The number of layers."""
    return config.get_text_config().num_hidden_layers


def find_layer_period(config: Any) -> int:
    """The number of layers after which layer types repeat; all layers if they never do."""
    config = config.get_text_config()
    kinds = [*(getattr(config, "layer_types", None) or ["one"] * count_layers(config))]
    periods = (
        n for n in range(1, len(kinds) + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)]
    )
    return next(periods) if _has_uniform_layers(config) else count_layers(config)


def _has_uniform_layers(config: Any) -> bool:
    """Whether layers differ only by `layer_types`: some models have experts in only a few."""
    defaults = {"first_k_dense_replace": 0, "mlp_only_layers": [], "decoder_sparse_step": 1}
    return all((getattr(config, k, None) or defaults[k]) == defaults[k] for k in defaults)


def truncate_layers(config: Any, count: int) -> Any:
    """The same model with only its first layers."""
    short = deepcopy(config)
    text = short.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:count]
    setattr(text, text.attribute_map.get("num_hidden_layers", "num_hidden_layers"), count)
    return short


def build_from_config(
    config: Any, adapter: Adapter, dtype: torch.dtype, *, full: bool = False
) -> Language:
    """The task of a model with this configuration, without a tokenizer for text.

    Args:
        config: transformers' configuration.
        adapter: the adapter's settings; `initial` is ignored.
        dtype: the dtype of the weights and the arithmetic.
        full: train every weight instead of an adapter.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    use_grouped_attention(model)
    # one that meta and fake tensors support: others have shapes that depend on data
    if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
    adapted = adapt_text(
        model,
        replace(adapter, initial=None),
        full=full,
        folder=Path(),
        sha256="",
        write=_write_nothing,
        weights="",
    )
    module = TokenLoss(model, plain_head=_is_plain_head(model))
    return Language(adapted, module, LoadedModel(model, None, Path(), ""), 0)


def _write_nothing(folder: Path, weights: Mapping[str, Tensor]) -> None:
    del folder, weights


@torch.no_grad()
def _is_plain_head(model: Any) -> bool:
    """Whether logits are the output layer's own tensor, checked without values."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    outputs: list[Tensor] = []
    hook = head.register_forward_hook(lambda *told: outputs.append(told[-1]))
    probe = torch.zeros(1, 4, dtype=torch.long, device=head.weight.device)
    mask = make_attention_mask(probe, next(model.parameters()).dtype)  # otherwise built from values
    with AnyDtypeExperts():
        logits = model(probe, attention_mask=mask, position_ids=probe, use_cache=False).logits
    hook.remove()
    return len(outputs) == 1 and logits is outputs[0]


def enable_checkpointing(task: Language) -> Language:
    """The task with gradient checkpointing: layers store only their input and are recomputed."""
    model, adapter = task.module.model, task.model.adapter
    adapted_layers = [*adapter.layers.values()] if isinstance(adapter, Lora) else []
    options = {
        "use_reentrant": False,
        "preserve_rng_state": False,
        "context_fn": partial(_make_contexts, adapted_layers),
    }
    # transformers 5.24 deprecates the only name that 5.20 has
    is_newer = hasattr(model, "activation_checkpointing_enable")
    enable = "activation_checkpointing_enable" if is_newer else "gradient_checkpointing_enable"
    getattr(model, enable)(options)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # only of this module: dropout inside it stays off
    return task


def _make_contexts(adapted_layers: Sequence[AdaptedLayer]) -> tuple[Any, Any]:
    """Contexts for a layer's first pass, and for its second with the first one's factors."""
    return nullcontext(), _bind_factors(adapted_layers, [site.factors for site in adapted_layers])


@contextmanager
def _bind_factors(adapted_layers: Sequence[AdaptedLayer], factors: Sequence[Any]) -> Iterator[None]:
    for layer, layer_factors in zip(adapted_layers, factors, strict=True):
        layer.factors = layer_factors
    yield
    for layer in adapted_layers:
        layer.factors = None


def find_linear_weights(task: Language) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that are quantized in a quantized backbone: all but the head's.

    They include experts stored as one tensor `[experts, rows, columns]`.
    """
    model = task.module.model
    head = model.get_output_embeddings()
    tied = {id(p) for layer in (head, model.get_input_embeddings()) for p in layer.parameters()}
    return {
        name.replace(".base.", "."): tuple(p.shape)
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in tied and not _is_position_embedding(name)
    }


def _is_position_embedding(name: str) -> bool:
    return name.endswith(("wpe.weight", "embed_positions.weight", "position_embeddings.weight"))
