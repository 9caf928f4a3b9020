"""A merged model's folder: what every reader that takes it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedgen_edge.adapters import peft_check
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.config import from_table
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.backbones import pretrained, whole_models
from fedgen_edge.tasks.language import task as language

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])
DEFAULT = {"rope_type": "default", "rope_theta": 100_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def merged(
    root: Path, targets: tuple[str, ...], rope: dict[str, Any] = DEFAULT, *, tied: bool = True
) -> tuple[Path, Tensor]:
    """A merged model's folder, and the logits of backbone and adapter in PEFT."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained._make_tiny())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        max_position_embeddings=64,
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / "backbone")
    tokenizer.save_pretrained(root / "backbone")
    table = {"path": str(root / "backbone"), "precision": "float32"}
    told = from_table({"backbone": table, "adapter": {"rank": 2, "target_modules": targets}})
    model = language.build(told, full=False, device=torch.device("cpu")).model
    assert isinstance(model.adapter, Lora)
    own = peft_check.draw_noisy(model.adapter, generator("noisy"))
    model.save(root / "adapter", own, told, {})
    plain = AutoModelForCausalLM.from_pretrained(root / "backbone")
    model.save_merged(root / "merged", own)
    return root / "merged", logits(PeftModel.from_pretrained(plain, str(root / "adapter")))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def configuration(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def taken_at_its_word(folder: Path) -> LlamaForCausalLM:
    """As older readers load it: the weights, and then what the configuration says is tied, tied."""
    config = LlamaConfig(**configuration(folder))
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True")
@pytest.mark.parametrize("targets", [("q_proj", "embed_tokens"), ("lm_head",), ("q_proj",)])
def test_tied_weights_of_which_one_is_adapted_are_tied_no_more(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    folder, theirs = merged(tmp_path, targets)
    assert configuration(folder)["tie_word_embeddings"] == (targets == ("q_proj",))
    close(logits(AutoModelForCausalLM.from_pretrained(folder)), theirs)
    close(logits(taken_at_its_word(folder)), theirs)


@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3])
def test_positions_are_the_same_by_the_older_names_alone(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    folder, theirs = merged(tmp_path, ("q_proj",), rope, tied=False)
    config = configuration(folder)
    assert config["rope_theta"] == rope["rope_theta"]
    close(logits(AutoModelForCausalLM.from_pretrained(folder)), theirs)
    # transformers 5 reads the older names too; without any of them it takes a base of 10,000
    older = {k: v for k, v in config.items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps(older))
    close(logits(AutoModelForCausalLM.from_pretrained(folder)), theirs)
    neither = {k: v for k, v in older.items() if k not in {"rope_theta", "rope_scaling"}}
    (folder / "config.json").write_text(json.dumps(neither))
    wrong = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (wrong - theirs).abs().max() > 0.01


def test_the_tokenizer_is_named_as_every_version_knows_it(tmp_path: Path) -> None:
    folder, _ = merged(tmp_path, ("q_proj",))
    table = json.loads((folder / "tokenizer_config.json").read_text())
    assert table["tokenizer_class"] == "PreTrainedTokenizerFast"
    before, after = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("backbone", "merged"))
    assert type(before) is type(after)
    assert before("Once upon a time").input_ids == after("Once upon a time").input_ids
    assert before.get_vocab() == after.get_vocab()


def test_the_text_part_of_a_model_that_reads_more_has_the_older_names_too(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "x", "text_config": {"rope_parameters": rope}}))
    whole_models.add_legacy_fields(tmp_path)
    assert json.loads(file.read_text())["text_config"] == {
        "rope_parameters": rope,
        "rope_theta": 1e6,
    }
