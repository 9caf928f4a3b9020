"""Causal language modeling with any Hugging Face causal language model."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerFast

from fedgen_edge.adapters.lora import Lora
from fedgen_edge.config import Adapter, Evaluation, Settings
from fedgen_edge.data.batches import pack, split_rows
from fedgen_edge.data.corpus import Corpus, Texts
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import seed_global_generators
from fedgen_edge.tasks.adapted import AdaptedModel, adapt
from fedgen_edge.tasks.backbones import pretrained, whole_models
from fedgen_edge.tasks.backbones.pretrained import LoadedModel
from fedgen_edge.tasks.generation import Decoding, Generation, encode_chat, is_chat_data
from fedgen_edge.tasks.language.backbone_checks import check_causal, check_packing
from fedgen_edge.tasks.language.compilation import compile_blocks
from fedgen_edge.tasks.language.loss import TokenLoss
from fedgen_edge.tasks.language.multimodal import check_text_layers, keep_to_text
from fedgen_edge.tasks.language.prefix_cache import (
    MAX_STATE_BYTES,
    NO_PREFIX_CACHE,
    STATES,
    PrefixCache,
    make_prefix_cache,
)
from fedgen_edge.tasks.measure import Measure
from fedgen_edge.tasks.task import Sample
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics, settle_nothing

MEASURE = Measure(
    name="perplexity",
    items="tokens",
    unit="nats a token",
    material="text",
    scarce_items=1000,  # about four batches of 4 x 64
    loss_spread=3.0,
    exponential=True,
)
EVALUATION_TOKENS = 4096
"""Tokens in one forward pass of evaluation."""
SHORT_PASS_TOKENS = 8
"""Tokens for comparing how libraries read an adapter."""
TOKENIZER_BATCH = 512
"""Texts per call of the tokenizer, whose output takes a hundred times a text's memory."""


@dataclass(frozen=True)
class Language:
    """Language modeling; the loss is in nats per next token, separately for packed documents.

    A batch holds the fields of `data.batches.pack`, `[*clients, batch, length]` each, and `words`,
    `[*clients, batch]`, so that nats per word compare any tokenizer with the literature.
    """

    model: AdaptedModel
    module: TokenLoss
    loaded: LoadedModel
    length: int
    """Tokens in a block."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = settle_nothing
    measure: Measure = MEASURE
    prefix_cache: PrefixCache = NO_PREFIX_CACHE

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, otherwise a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, with a dropout seed."""
        return {**examples, "seed": torch.randint(2**62, (), generator=rng)}

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed nats and the number of tokens."""
        del phase
        clients = batch["mask"].shape[:-2]
        rows = {k: v.flatten(0, -2) for k, v in _select_model_inputs(batch).items()}
        states = batch[STATES].flatten(0, -3) if STATES in batch else None
        with self.prefix_cache.reuse_states(states):
            nats = self.model.adapter.call(self.module, adapter, rows, batch.get("seed"))
        return PerClient(
            total=nats.reshape(*clients, -1).sum(-1),
            count=batch["mask"].flatten(-2).sum(-1).float(),
        )

    def precompute(self, client_examples: Iterable[Batch]) -> list[Batch] | None:
        """The same examples, with the output of the layers below the lowest adapted one.

        None if the lowest layer is adapted, or if the output takes more than `MAX_STATE_BYTES`.
        """
        client_examples = [*client_examples] if self.prefix_cache.size else []
        if (
            not 0
            < self.prefix_cache.size * sum(own["mask"].numel() for own in client_examples)
            <= MAX_STATE_BYTES
        ):
            return None
        return [{**own, STATES: self._compute_states(own)} for own in client_examples]

    def _compute_states(self, examples: Batch) -> Tensor:
        device, num_rows = self.module.model.device, max(1, EVALUATION_TOKENS // self.length)
        rows = split_rows(
            {k: v.to(device) for k, v in _select_model_inputs(examples).items()}, 0, num_rows
        )
        return torch.cat([self.prefix_cache.compute_states(part).cpu() for part in rows])

    @torch.no_grad()
    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Nats (`total`), tokens (`count`) and words; sums in float64."""
        clients, length = examples["mask"].shape[:-2], examples["mask"].shape[-1]
        num_rows = max(1, EVALUATION_TOKENS // (length * clients.numel()))
        sums = {k: torch.zeros(clients, dtype=torch.float64) for k in ("total", "count", "words")}
        for part in split_rows(examples, len(clients), num_rows):
            loss = self.loss(adapter, part, "")
            sums["total"] += loss.total.double().cpu()
            sums["count"] += loss.count.double().cpu()
            sums["words"] += part["words"].double().sum(-1).cpu()
        return sums

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Nats per token, and perplexity per token and per word."""
        loss = statistics["total"] / statistics["count"]
        by_word = (statistics["total"] / statistics["words"]).exp()
        return {"loss": loss, "perplexity": loss.exp(), "word_perplexity": by_word}

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Selected texts, encoded and packed into blocks."""
        texts = corpus.examples
        if not isinstance(texts, Texts):
            raise ConfigError(
                "task='language' learns text, and the data are pictures: set data.source, or task"
            )
        documents = self.encode([texts.texts[i] for i in indices])
        words = [texts.words[i] for i in indices]
        vocabulary_size = self.loaded.model.config.get_text_config().vocab_size
        largest_token = max((max(ids) for ids in documents), default=0)
        if largest_token >= vocabulary_size:
            raise ConfigError(
                f"backbone.path={str(self.loaded.folder)!r}: its tokenizer gives token "
                f"{largest_token}, and "
                f"its model knows {vocabulary_size}: take the tokenizer that belongs to it"
            )
        return pack(documents, words, self.length, vocabulary_size)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, including its start and end tokens."""
        tokenizer = self.loaded.tokenizer
        end = tokenizer.eos_token_id
        start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if end is None:
            raise ConfigError(
                f"backbone.path={str(self.loaded.folder)!r}: its tokenizer has no end mark "
                "(eos_token): set one in tokenizer_config.json"
            )
        parts = (
            list(texts[at : at + TOKENIZER_BATCH]) for at in range(0, len(texts), TOKENIZER_BATCH)
        )
        return [[start, *ids, end] for part in parts for ids in _tokenize(tokenizer, part)]

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """The continuation of each prompt."""
        decoding = Decoding(settings.sample_tokens)
        for prompt in _get_prompts(settings):
            yield Sample(prompt, self.generate(adapter, prompt, decoding, key))

    def generate(
        self, adapter: Leaves, prompt: str, decoding: Decoding, seed: int, *, chat: bool = False
    ) -> str:
        """A prompt and its continuation, or the answer to it; the same seed gives the same text.

        Args:
            adapter: the adapter of the model.
            prompt: plain text, or a user's message.
            decoding: how tokens are chosen.
            seed: seed of the sampling.
            chat: answer the prompt with the chat template instead of continuing it.

        Raises:
            ConfigError: the context is too short, or there is no chat template.
        """
        model, tokenizer = self.module.model, self.loaded.tokenizer
        encoded = encode_chat(tokenizer, prompt) if chat else self.encode([prompt])[0][:-1]
        tokens, context_length = decoding.max_new_tokens, _get_context_length(model.config)
        if len(encoded) + tokens > context_length:
            raise ConfigError(
                f"{tokens} tokens after a prompt of {len(encoded)} are above "
                f"{context_length}, the context "
                "of this backbone: ask for fewer"
            )
        weights = {k: v.to(model.device) for k, v in adapter.items()}
        ids = torch.tensor([encoded], device=model.device)
        generation = Generation(model, tokenizer, decoding)
        with seed_global_generators("sample", seed, device=model.device):
            new_tokens = self.model.adapter.call(generation, weights, ids, None)[0].tolist()
        return tokenizer.decode(
            new_tokens if chat else encoded[1:] + new_tokens, skip_special_tokens=True
        )

    def is_chat_data(self, texts: Sequence[str]) -> bool:
        """Whether most texts follow the backbone's chat template."""
        return is_chat_data(self.loaded.tokenizer, texts)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids only: a tokenizer's other outputs would double the time."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    library = tokenizer.backend_tokenizer
    library.encode_special_tokens = tokenizer.split_special_tokens
    library.no_truncation()
    library.no_padding()
    return [said.ids for said in library.encode_batch_fast(texts, add_special_tokens=False)]


def _select_model_inputs(batch: Batch) -> Batch:
    return {k: batch[k] for k in ("tokens", "labels", "mask", "segment", "position")}


def build(settings: Settings, *, full: bool, device: torch.device) -> Language:
    """The task for these settings, with its backbone loaded and frozen.

    Args:
        settings: the run's settings.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    loaded = pretrained.load(settings.backbone, device)
    model = loaded.model
    check_length(settings, model.config)
    _check_samples(settings, loaded)
    check_causal(settings.backbone.path, model)
    check_packing(settings.backbone.path, model)
    adapted = adapt_text(
        model,
        settings.adapter,
        full=full,
        folder=loaded.folder,
        sha256=loaded.sha256,
        write=partial(whole_models.write, model, loaded.tokenizer),
        weights="model.safetensors",
        peft={"task_type": "CAUSAL_LM"},
        forward=partial(_run_short_pass, model),
    )
    module = TokenLoss(model)
    sites = adapted.adapter.layers if isinstance(adapted.adapter, Lora) else ()
    if settings.engine.compile and sites:
        if settings.adapter.dropout:  # each layer has its own mask, so no two would share a graph
            raise ConfigError(
                f"engine.compile=true does not go with adapter.dropout={settings.adapter.dropout}: "
                "leave one of them out"
            )
        compile_blocks(model)
    return Language(
        adapted, module, loaded, settings.data.length, prefix_cache=make_prefix_cache(module, sites)
    )


def adapt_text(model: Any, settings: Adapter, *, full: bool, **where: Any) -> AdaptedModel:
    """Freeze and adapt a language model, as `adapted.adapt`; in a multimodal one, its text part.

    Raises:
        ConfigError: a trained layer is one that text does not pass through.
    """
    default = get_default_targets(model.config.get_text_config().model_type)
    adapted = adapt(model, keep_to_text(settings, model, default), default, full=full, **where)
    if isinstance(adapted.adapter, Lora):
        setting = f"adapter.target_modules={[*settings.target_modules]}"
        check_text_layers(model, adapted.adapter.layers, setting)
    else:
        check_text_layers(model, adapted.adapter.shapes(), "a method of every weight")
    return adapted


def _run_short_pass(model: Any) -> Tensor:
    """Logits of a few tokens."""
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(SHORT_PASS_TOKENS, device=model.device)[None] % vocabulary_size
    return model(input_ids=ids, use_cache=False).logits


def get_default_targets(kind: str) -> list[str]:
    """The layers that PEFT adapts by default in models of this type."""
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, "all-linear")
    return [targets] if isinstance(targets, str) else [*targets]


def _get_prompts(settings: Evaluation) -> Sequence[str]:
    return (settings.prompts or ("The ",)) if settings.sample_tokens else ()


def _get_context_length(config: Any) -> int:
    """The backbone's context length in tokens."""
    context_length = _read_integer(config, "max_position_embeddings")
    return context_length if context_length and context_length > 0 else sys.maxsize


def _read_integer(config: Any, name: str) -> int | None:
    """An integer of the configuration, or None if it has no such value."""
    value = getattr(config.get_text_config(), name, None)
    if value is None or isinstance(value, int):
        return value
    raise ConfigError(
        f"backbone.path: {name}={value!r} in its config.json is no whole number: correct it"
    )


def check_length(settings: Settings, config: Any) -> None:
    """Refuse blocks longer than the model's context or its attention window.

    Raises:
        ConfigError: blocks are too long.
    """
    context_length, length = _get_context_length(config), settings.data.length
    if length > context_length:
        raise ConfigError(
            f"data.length={length} is above {context_length}, the context of this "
            "backbone: take a shorter "
            "one"
        )
    window = _get_attention_window(config)
    if window and length > window:
        raise ConfigError(
            f"data.length={length} is above {window}, the window of this backbone's attention, "
            "beyond which training would see more than the model is used with: take at most "
            f"{window}"
        )


def _get_attention_window(config: Any) -> int | None:
    """The attention window of the backbone's sliding layers; None if there is none."""
    types = getattr(config.get_text_config(), "layer_types", None) or ["sliding_attention"]
    return _read_integer(config, "sliding_window") if "sliding_attention" in types else None


def _check_samples(settings: Settings, loaded: LoadedModel) -> None:
    context_length, evaluation = _get_context_length(loaded.model.config), settings.evaluation
    prompts = [_tokenize(loaded.tokenizer, [prompt])[0] for prompt in _get_prompts(evaluation)]
    longest = 1 + max(map(len, prompts), default=0)
    if longest + evaluation.sample_tokens > context_length:
        raise ConfigError(
            f"evaluation.sample_tokens={evaluation.sample_tokens} after a prompt of "
            f"{longest} tokens is "
            f"above {context_length}, the context of this backbone: take fewer"
        )
