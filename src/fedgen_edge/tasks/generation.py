"""Text from a causal language model, by transformers' own generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import GenerationConfig

from fedgen_edge.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """How each next token is chosen, with the option names of transformers."""

    max_new_tokens: int = 60
    temperature: float = 0.7
    """0 takes the most probable token each time (greedy)."""
    top_p: float = 0.9
    top_k: int = 0
    """0 keeps all tokens."""
    repetition_penalty: float = 1.0


class Generation(nn.Module):
    """A model's `generate` as a forward pass, so that an adapter can be bound to it.

    Only the end tokens of the model's `generation_config` are used: it could ask for beam search,
    or for a decoding method whose code transformers fetches from the hub.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding) -> None:
        super().__init__()
        self.model = model
        ends = find_end_tokens(model, tokenizer)
        sampling = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
        self.options = {
            "max_new_tokens": decoding.max_new_tokens,
            "do_sample": decoding.temperature > 0,
            **(sampling if decoding.temperature > 0 else {}),
            "repetition_penalty": decoding.repetition_penalty,
            "eos_token_id": ends or None,
            "pad_token_id": next(iter(ends), 0),
        }

    def forward(self, ids: Tensor) -> Tensor:
        """The generated tokens, `[1, new]`, after a prompt of `[1, length]`."""
        model_config, self.model.generation_config = (
            self.model.generation_config,
            GenerationConfig(),
        )
        try:
            all_tokens = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), **self.options
            )
        finally:
            self.model.generation_config = model_config
        return all_tokens[:, ids.shape[1] :]


def find_end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation_config."""
    model_end_token = model.generation_config.eos_token_id
    end_tokens = model_end_token if isinstance(model_end_token, list) else [model_end_token]
    return sorted({mark for mark in (*end_tokens, tokenizer.eos_token_id) if mark is not None})


def encode_chat(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a user's message and of the start of the answer.

    Raises:
        ConfigError: the tokenizer has no chat template, or its template does not work.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "--chat: this backbone's tokenizer has no chat template: leave --chat out"
        )
    try:
        return tokenizer.apply_chat_template(
            _make_messages(prompt), add_generation_prompt=True, return_dict=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--chat: the tokenizer's chat template fails ({reason}): say --no-chat"
        ) from None


def is_chat_data(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether most of these texts mark user messages as the chat template does."""
    if not tokenizer.chat_template:
        return False
    try:
        rendered = tokenizer.apply_chat_template(_make_messages("{message}"), tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return False
    before = rendered.partition("{message}")[0].replace(tokenizer.bos_token or "", "")
    mark = before.strip().splitlines()[-1:]
    return bool(mark) and 2 * sum(mark[0] in text for text in texts) > len(texts)


def _make_messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
