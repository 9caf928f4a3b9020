"""A language model's task from its configuration alone, on whatever device is at hand.

On torch's meta device, or under fake tensors, it has every shape and no values: a model of any size
is outlined in a second. On a processor its weights are random.
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
from fedgen_edge.adapters.lora import Lora, Site
from fedgen_edge.config import Adapter, Backbone
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import seeded
from fedgen_edge.tasks import backbones
from fedgen_edge.tasks.attention import quicken
from fedgen_edge.tasks.backbones import Loaded
from fedgen_edge.tasks.experts import AnyType
from fedgen_edge.tasks.families import FAMILIES, family
from fedgen_edge.tasks.gguf_files import is_gguf
from fedgen_edge.tasks.language import Language, adapt_text
from fedgen_edge.tasks.loading import (
    FAILURES,
    check_code,
    check_quantization,
    check_text,
    describe,
    read_config_file,
    read_tokenizer,
)
from fedgen_edge.tasks.loss import TokenLoss, attention

WAYS = "give a config.json, its folder, a hub id, or one of " + ", ".join(FAMILIES)


def config_of(settings: Backbone, setting: str = "backbone.path") -> Any:
    """The configuration of a backbone; its weights are neither looked for nor read.

    Args:
        settings: where it is.
        setting: that says so, by its dotted name.

    Raises:
        ConfigError: there is none, it is not one of transformers', or it is no causal language
            model's.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    said = f"{setting}={settings.path!r}"
    told = family(settings.path) or read_config_file(_file(settings, said), said)
    kind = told.get("model_type")
    check_quantization(told, said)
    try:
        config = made_of(told)
    except FAILURES as error:
        check_code(told, None, said)
        raise ConfigError(
            f"{said} has model_type={kind!r}, or values with it, that cannot be read "
            f"({describe(error, 120)}): {WAYS}"
        ) from None
    check_code(told, config, said)
    made_for = told.get("architectures")
    made_for = [str(name) for name in made_for] if isinstance(made_for, list) else []
    model = AutoModelForCausalLM._model_mapping.get(type(config), None)
    same = {"CausalLM", "LMHead", getattr(model, "__name__", "CausalLM")}
    causal = not made_for or any(word in name for name in made_for for word in same)
    if model is None or not causal:
        raise ConfigError(
            f"{said}, a {kind} for {made_for or 'other tasks'}, is no causal language model: take "
            "another"
        )
    check_text(config, said, "vocab_size", "num_hidden_layers")
    return config


def made_of(shape: Mapping[str, Any]) -> Any:
    """The configuration with these values; as transformers has them where there are none."""
    return AutoConfig.for_model(**shape)


def _file(settings: Backbone, said: str) -> Path:
    path = Path(settings.path)
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = [file.name for file in sorted(path.iterdir()) if is_gguf(file)]
        ways = f"give the file itself, {path / ggufs[0]}" if ggufs else WAYS
        raise ConfigError(f"{said} has no config.json: {ways}")
    if path.suffix == ".json" and not path.is_dir():
        return path
    if settings.path == "tiny" or settings.path.startswith("package:") or is_gguf(path):
        return backbones.find(settings) / "config.json"
    if path.is_dir():
        return path / "config.json"
    if "/" not in settings.path or path.is_absolute() or settings.path.startswith("."):
        raise ConfigError(f"{said} is no model that is known: {WAYS}")
    try:
        return Path(hf_hub_download(settings.path, "config.json", revision=settings.revision))
    except (HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{said} was not found ({reason}): {WAYS}") from None


def fresh(path: str, backbone: Backbone) -> Path:
    """The folder of a language model that has learnt nothing, equal on every machine.

    Args:
        path: of its configuration, as `fedgen plan` takes one; its vocabulary and its marks are
            the tokenizer's, whatever it says.
        backbone: whose tokenizer it has; that one's weights are not read.

    Raises:
        ConfigError: it is no causal language model's, or the backbone has no tokenizer.
    """
    path = str(files.find_recipe(path)) if path.endswith(".json") else path
    config = config_of(Backbone(path=path), "pretrain.config").get_text_config()
    folder = backbones.find(backbone)
    tokenizer = read_tokenizer(folder, f"backbone.path={backbone.path!r}")
    if not tokenizer("a word")["input_ids"]:
        raise ConfigError(
            f"backbone.path={backbone.path!r} has no tokenizer that tells words: give a folder or "
            "a hub id with one"
        )
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in MARKS}
    config.update({"vocab_size": len(tokenizer), **marks})
    read = [file for file in sorted(folder.iterdir()) if file.suffix in READ]
    told = [config.to_json_string(use_diff=False), *map(files.digest, read)]
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return backbones.cached(f"fresh-{name}", partial(_write_fresh, config, tokenizer))


MARKS = ("bos", "eos", "pad")
READ = {".json", ".model", ".txt"}
"""What a tokenizer's files end in."""


def _write_fresh(config: Any, tokenizer: Any, folder: Path) -> None:
    try:
        with seeded("fresh"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"pretrain.config: no {config.model_type} has this shape ({describe(error, 120)}): "
            "correct it"
        ) from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def layers(config: Any) -> int:
    """How many there are."""
    return config.get_text_config().num_hidden_layers


def period(config: Any) -> int:
    """After how many layers they begin again; all of them where they never do."""
    config = config.get_text_config()
    kinds = [*(getattr(config, "layer_types", None) or ["one"] * layers(config))]
    found = (n for n in range(1, len(kinds) + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)])
    return next(found) if _uniform(config) else layers(config)


def _uniform(config: Any) -> bool:
    """Whether nothing but `layer_types` tells layers apart: some have experts in a few alone."""
    usual = {"first_k_dense_replace": 0, "mlp_only_layers": [], "decoder_sparse_step": 1}
    return all((getattr(config, k, None) or usual[k]) == usual[k] for k in usual)


def shortened(config: Any, count: int) -> Any:
    """The same model with fewer layers, its first ones."""
    short = deepcopy(config)
    text = short.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:count]
    setattr(text, text.attribute_map.get("num_hidden_layers", "num_hidden_layers"), count)
    return short


def outlined(config: Any, adapter: Adapter, dtype: torch.dtype, *, full: bool = False) -> Language:
    """The task of a model of this configuration; it has no tokenizer, and reads no text.

    Args:
        config: transformers'.
        adapter: what is put into it; `initial` is not read.
        dtype: of the weights and the arithmetic.
        full: train every weight instead.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    quicken(model)
    # as meta tensors and fakes do it too: none of the ways by data, of which shapes are not known
    if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
    adapted = adapt_text(
        model,
        replace(adapter, initial=None),
        full=full,
        folder=Path(),
        sha256="",
        write=_nothing,
        weights="",
    )
    module = TokenLoss(model, plain_head=_plain_head(model))
    return Language(adapted, module, Loaded(model, None, Path(), ""), 0)


def _nothing(folder: Path, weights: Mapping[str, Tensor]) -> None:
    del folder, weights


@torch.no_grad()
def _plain_head(model: Any) -> bool:
    """Whether logits are the output layer's very tensor, as shapes alone can tell."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda *told: seen.append(told[-1]))
    probe = torch.zeros(1, 4, dtype=torch.long, device=head.weight.device)
    mask = attention(probe, next(model.parameters()).dtype)  # else it would be made of values
    with AnyType():
        found = model(probe, attention_mask=mask, position_ids=probe, use_cache=False).logits
    hook.remove()
    return len(seen) == 1 and found is seen[0]


def checkpointed(task: Language) -> Language:
    """The same, whose layers keep their input alone, and are computed again on the way back."""
    model, adapter = task.module.model, task.model.adapter
    sites = [*adapter.sites.values()] if isinstance(adapter, Lora) else []
    how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": partial(_both, sites)}
    # transformers 5.24 warns of the name that 5.20 knows alone
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = "activation_checkpointing_enable" if newer else "gradient_checkpointing_enable"
    getattr(model, enable)(how)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # of this one alone: dropout within stays off
    return task


def _both(sites: Sequence[Site]) -> tuple[Any, Any]:
    """A layer's first pass as it is; its second with the factors that the first one had."""
    return nullcontext(), _bound(sites, [site.factors for site in sites])


@contextmanager
def _bound(sites: Sequence[Site], factors: Sequence[Any]) -> Iterator[None]:
    for site, own in zip(sites, factors, strict=True):
        site.factors = own
    yield
    for site in sites:
        site.factors = None


def linear_weights(task: Language) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that are quantised where a backbone is: all but the head's.

    What mixtures of experts hold as one tensor `[experts, rows, columns]` is among them.
    """
    model = task.module.model
    head = model.get_output_embeddings()
    tied = {id(p) for layer in (head, model.get_input_embeddings()) for p in layer.parameters()}
    return {
        name.replace(".base.", "."): tuple(p.shape)
        for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in tied and not _positions(name)
    }


def _positions(name: str) -> bool:
    return name.endswith(("wpe.weight", "embed_positions.weight", "position_embeddings.weight"))
