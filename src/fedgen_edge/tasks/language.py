"""Causal language modelling with any Hugging Face causal language model."""

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
from fedgen_edge.data.batches import pack, parts
from fedgen_edge.data.corpus import Corpus, Texts
from fedgen_edge.errors import ConfigError
from fedgen_edge.measure import Measure
from fedgen_edge.seeds import seeded
from fedgen_edge.tasks import backbones, whole_models
from fedgen_edge.tasks.adapted import Adapted, adapt
from fedgen_edge.tasks.backbone_checks import check_causal, check_packing
from fedgen_edge.tasks.backbones import Loaded
from fedgen_edge.tasks.compiling import compiled
from fedgen_edge.tasks.generation import Decoding, Generation, encode_chat, holds_chats
from fedgen_edge.tasks.loss import TokenLoss
from fedgen_edge.tasks.lower import NONE, ROOM, STATES, Lower, lower
from fedgen_edge.tasks.multimodal import check_text_layers, keep_to_text
from fedgen_edge.tasks.task import Sample
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics, none_follow

MEASURE = Measure(
    name="perplexity",
    items="tokens",
    unit="nats a token",
    material="text",
    few=1000,  # about four batches of 4 x 64
    spread=3.0,
    exponential=True,
)
EVALUATE = 4096
"""Tokens in one forward pass of an evaluation."""
SHORT = 8
"""Tokens by which readers of an adapter are compared."""
SLICE = 512
"""Texts that the tokenizer gets at once: what it returns takes a hundred times a text's room."""


@dataclass(frozen=True)
class Language:
    """The loss is that of each next token, in nats; documents of one block do not meet.

    A batch holds, `[*clients, batch, length]` each, what `data.batches.pack` makes, and `words`,
    `[*clients, batch]`: so that total nats over words compares any tokenizer with the literature.
    """

    model: Adapted
    module: TokenLoss
    loaded: Loaded
    length: int
    """Tokens in a block."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = none_follow
    measure: Measure = MEASURE
    lower: Lower = NONE

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, else a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, and the seed of their dropout."""
        return {**examples, "seed": torch.randint(2**62, (), generator=rng)}

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed nats and their number of tokens."""
        del phase
        clients = batch["mask"].shape[:-2]
        rows = {k: v.flatten(0, -2) for k, v in _blocks(batch).items()}
        states = batch[STATES].flatten(0, -3) if STATES in batch else None
        with self.lower.passed(states):
            nats = self.model.adapter.call(self.module, adapter, rows, batch.get("seed"))
        return PerClient(
            total=nats.reshape(*clients, -1).sum(-1),
            count=batch["mask"].flatten(-2).sum(-1).float(),
        )

    def ahead(self, each: Iterable[Batch]) -> list[Batch] | None:
        """The same examples, with what the layers below the lowest adapted one make of them.

        None, where the lowest layer is adapted, or where that takes more than `ROOM` bytes.
        """
        each = [*each] if self.lower.size else []
        if not 0 < self.lower.size * sum(own["mask"].numel() for own in each) <= ROOM:
            return None
        return [{**own, STATES: self._states(own)} for own in each]

    def _states(self, examples: Batch) -> Tensor:
        device, most = self.module.model.device, max(1, EVALUATE // self.length)
        rows = parts({k: v.to(device) for k, v in _blocks(examples).items()}, 0, most)
        return torch.cat([self.lower.states(part).cpu() for part in rows])

    @torch.no_grad()
    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Nats (`total`), tokens (`count`) and words; sums in float64."""
        clients, length = examples["mask"].shape[:-2], examples["mask"].shape[-1]
        each = max(1, EVALUATE // (length * clients.numel()))
        sums = {k: torch.zeros(clients, dtype=torch.float64) for k in ("total", "count", "words")}
        for part in parts(examples, len(clients), each):
            loss = self.loss(adapter, part, "")
            sums["total"] += loss.total.double().cpu()
            sums["count"] += loss.count.double().cpu()
            sums["words"] += part["words"].double().sum(-1).cpu()
        return sums

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Nats a token, and perplexity a token and a word."""
        loss = statistics["total"] / statistics["count"]
        by_word = (statistics["total"] / statistics["words"]).exp()
        return {"loss": loss, "perplexity": loss.exp(), "word_perplexity": by_word}

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Some texts, encoded and packed into blocks."""
        held = corpus.examples
        if not isinstance(held, Texts):
            raise ConfigError(
                "task='language' learns text, and the data are pictures: set data.source, or task"
            )
        documents = self.encode([held.texts[i] for i in indices])
        words = [held.words[i] for i in indices]
        known = self.loaded.model.config.get_text_config().vocab_size
        most = max((max(ids) for ids in documents), default=0)
        if most >= known:
            raise ConfigError(
                f"backbone.path={str(self.loaded.folder)!r}: its tokenizer gives token {most}, and "
                f"its model knows {known}: take the tokenizer that belongs to it"
            )
        return pack(documents, words, self.length, known)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each document, from its start mark to its end mark."""
        tokenizer = self.loaded.tokenizer
        end = tokenizer.eos_token_id
        start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if end is None:
            raise ConfigError(
                f"backbone.path={str(self.loaded.folder)!r}: its tokenizer has no end mark "
                "(eos_token): set one in tokenizer_config.json"
            )
        parts = (list(texts[at : at + SLICE]) for at in range(0, len(texts), SLICE))
        return [[start, *ids, end] for part in parts for ids in _ids(tokenizer, part)]

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """How each prompt goes on."""
        decoding = Decoding(settings.sample_tokens)
        for prompt in _prompts(settings):
            yield Sample(prompt, self.generate(adapter, prompt, decoding, key))

    def generate(
        self, adapter: Leaves, prompt: str, decoding: Decoding, seed: int, *, chat: bool = False
    ) -> str:
        """A prompt and how it goes on, or the answer to it; the same seed gives the same text.

        Args:
            adapter: what the model computes with.
            prompt: plain text, or a user's message.
            decoding: how tokens are chosen.
            seed: of the sampling.
            chat: answer the prompt by the chat template, where else it is continued.

        Raises:
            ConfigError: the context has no room, or there is no chat template.
        """
        model, tokenizer = self.module.model, self.loaded.tokenizer
        encoded = encode_chat(tokenizer, prompt) if chat else self.encode([prompt])[0][:-1]
        tokens, most = decoding.max_new_tokens, _context(model.config)
        if len(encoded) + tokens > most:
            raise ConfigError(
                f"{tokens} tokens after a prompt of {len(encoded)} are above {most}, the context "
                "of this backbone: ask for fewer"
            )
        weights = {k: v.to(model.device) for k, v in adapter.items()}
        ids = torch.tensor([encoded], device=model.device)
        generation = Generation(model, tokenizer, decoding)
        with seeded("sample", seed, device=model.device):
            new = self.model.adapter.call(generation, weights, ids, None)[0].tolist()
        return tokenizer.decode(new if chat else encoded[1:] + new, skip_special_tokens=True)

    def holds_chats(self, texts: Sequence[str]) -> bool:
        """Whether most texts are written by the backbone's chat template."""
        return holds_chats(self.loaded.tokenizer, texts)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token numbers, without what else a tokenizer says of them: that takes it as long again."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    library = tokenizer.backend_tokenizer
    library.encode_special_tokens = tokenizer.split_special_tokens
    library.no_truncation()
    library.no_padding()
    return [said.ids for said in library.encode_batch_fast(texts, add_special_tokens=False)]


def _blocks(batch: Batch) -> Batch:
    return {k: batch[k] for k in ("tokens", "labels", "mask", "segment", "position")}


def build(settings: Settings, *, full: bool, device: torch.device) -> Language:
    """The task of these settings, its backbone loaded and frozen.

    Args:
        settings: of the run.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    loaded = backbones.load(settings.backbone, device)
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
        forward=partial(_short_pass, model),
    )
    module = TokenLoss(model)
    sites = adapted.adapter.sites if isinstance(adapted.adapter, Lora) else ()
    if settings.engine.compile and sites:
        if settings.adapter.dropout:  # each layer draws its own, so that none would share a graph
            raise ConfigError(
                f"engine.compile=true does not go with adapter.dropout={settings.adapter.dropout}: "
                "leave one of them out"
            )
        compiled(model)
    return Language(adapted, module, loaded, settings.data.length, lower=lower(module, sites))


def adapt_text(model: Any, settings: Adapter, *, full: bool, **where: Any) -> Adapted:
    """Freeze a language model and adapt it, as `adapted.adapt`; of what reads more, its text part.

    Raises:
        ConfigError: layers would be trained that no text passes.
    """
    default = default_targets(model.config.get_text_config().model_type)
    adapted = adapt(model, keep_to_text(settings, model, default), default, full=full, **where)
    if isinstance(adapted.adapter, Lora):
        setting = f"adapter.target_modules={[*settings.target_modules]}"
        check_text_layers(model, adapted.adapter.sites, setting)
    else:
        check_text_layers(model, adapted.adapter.shapes(), "a method of every weight")
    return adapted


def _short_pass(model: Any) -> Tensor:
    """Logits of a few tokens."""
    known = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(SHORT, device=model.device)[None] % known
    return model(input_ids=ids, use_cache=False).logits


def default_targets(kind: str) -> list[str]:
    """The layers that PEFT adapts in models of this type."""
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, "all-linear")
    return [targets] if isinstance(targets, str) else [*targets]


def _prompts(settings: Evaluation) -> Sequence[str]:
    return (settings.prompts or ("The ",)) if settings.sample_tokens else ()


def _context(config: Any) -> int:
    """Most tokens that the backbone reads at once."""
    most = _number(config, "max_position_embeddings")
    return most if most and most > 0 else sys.maxsize


def _number(config: Any, name: str) -> int | None:
    """A whole number of the configuration, if it has one of this name."""
    value = getattr(config.get_text_config(), name, None)
    if value is None or isinstance(value, int):
        return value
    raise ConfigError(
        f"backbone.path: {name}={value!r} in its config.json is no whole number: correct it"
    )


def check_length(settings: Settings, config: Any) -> None:
    """Refuse blocks longer than a model of this configuration reads, or than its layers see.

    Raises:
        ConfigError: they are.
    """
    most, length = _context(config), settings.data.length
    if length > most:
        raise ConfigError(
            f"data.length={length} is above {most}, the context of this backbone: take a shorter "
            "one"
        )
    window = _window(config)
    if window and length > window:
        raise ConfigError(
            f"data.length={length} is above {window}, the window of this backbone's attention, "
            "beyond which training would see more than the model is used with: take at most "
            f"{window}"
        )


def _window(config: Any) -> int | None:
    """How far back some layers of the backbone see; none is as far as all do."""
    types = getattr(config.get_text_config(), "layer_types", None) or ["sliding_attention"]
    return _number(config, "sliding_window") if "sliding_attention" in types else None


def _check_samples(settings: Settings, loaded: Loaded) -> None:
    most, e = _context(loaded.model.config), settings.evaluation
    prompts = [_ids(loaded.tokenizer, [prompt])[0] for prompt in _prompts(e)]
    longest = 1 + max(map(len, prompts), default=0)
    if longest + e.sample_tokens > most:
        raise ConfigError(
            f"evaluation.sample_tokens={e.sample_tokens} after a prompt of {longest} tokens is "
            f"above {most}, the context of this backbone: take fewer"
        )
