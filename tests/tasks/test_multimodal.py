"""A tiny Gemma 3 that reads images too, learning text: against PEFT and plain transformers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from fedgen_edge.config import Adapter, Backbone, Settings, from_table
from fedgen_edge.data.batches import pack
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.config_only import build_from_config, count_layers, load_config
from fedgen_edge.tasks.language.task import Language
from support.model_folders import SHAPE, save

WINDOW = 64


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its text layers and its vision layers both have a q_proj and a v_proj."""
    kinds = ["sliding_attention", "full_attention"]
    text = {**SHAPE, "vocab_size": 262, "head_dim": 8, "sliding_window": WINDOW}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    image = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config={**text, "layer_types": kinds},
        vision_config={**vision, **image},
        mm_tokens_per_image=4,
        image_token_index=261,
        boi_token_index=259,
        eoi_token_index=260,
    )
    return save(Gemma3ForConditionalGeneration(config), tmp_path_factory.mktemp("gemma"))


def settings(folder: Path, targets: Sequence[str] = (), length: int = WINDOW) -> Settings:
    return from_table({
        "backbone": {"path": str(folder), "precision": "float32"},
        "adapter": {"rank": 2, "target_modules": list(targets)},
        "data": {"length": length},
    })  # fmt: skip


def build(folder: Path, targets: Sequence[str] = (), *, full: bool = False) -> Language:
    return language.build(settings(folder, targets), full=full, device=torch.device("cpu"))


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_the_text_layers_are_adapted_as_peft_reads_them(
    targets: tuple[str, ...], gemma: Path, tmp_path: Path
) -> None:
    task = build(gemma, targets)
    rng = generator("noise")
    noise = {k: torch.randn(s, generator=rng) for k, s in task.model.leaf_shapes().items()}
    assert len(noise) == 2 * 2 * 2  # both factors, of q and v, in two layers
    task.model.save(tmp_path / "adapter", noise, settings(gemma, targets), {})
    plain = AutoModelForCausalLM.from_pretrained(gemma)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    documents = task.encode(["a red ball", "the sun"])
    nats = 0.0
    for ids in torch.tensor(documents[0]), torch.tensor(documents[1]):
        with torch.no_grad():
            logits = theirs(input_ids=ids[None, :-1]).logits[0]
        nats += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
    ours = task.evaluate(noise, pack(documents, [4, 3], WINDOW))
    assert float(ours["total"]) == pytest.approx(nats, rel=1e-5)


def test_every_linear_layer_means_the_text_s(gemma: Path) -> None:
    task = build(gemma, ["all-linear"])
    leaves = task.model.leaf_shapes()
    assert len(leaves) == 2 * 7 * 2  # q, k, v, o, gate, up and down, in two layers
    assert all("language_model" in name for name in leaves)


def test_what_no_text_passes_is_not_trained(gemma: Path) -> None:
    with pytest.raises(ConfigError, match=r"no text passes in a gemma3 .*vision_tower"):
        build(gemma, [r".*vision_tower.*q_proj"])
    with pytest.raises(ConfigError, match=r"no text passes in a gemma3 .*vision_tower"):
        build(gemma, full=True)


def test_its_window_and_its_layers_are_the_text_s(gemma: Path) -> None:
    config = load_config(Backbone(path=str(gemma)))
    assert count_layers(config) == 2
    with pytest.raises(ConfigError, match=f"above {WINDOW}, the window"):
        language.check_length(settings(gemma, length=WINDOW + 1), config)
    with pytest.raises(ConfigError, match=f"above {SHAPE['max_position_embeddings']}, the context"):
        language.check_length(settings(gemma, length=129), config)
    with torch.device("meta"):
        task = build_from_config(config, Adapter(rank=2), torch.float32)
    assert task.model.leaf_shapes() == build(gemma).model.leaf_shapes()
