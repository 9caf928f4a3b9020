"""Well-known models by name: their published numbers of parameters, and mistakes in a name."""

import json
import re
from pathlib import Path

import pytest
import torch

from fedgen_edge.config import Adapter, Backbone
from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.language.config_only import (
    build_from_config,
    find_layer_period,
    load_config,
    make_config,
    truncate_layers,
)
from fedgen_edge.tasks.language.families import FAMILIES

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-2-70b": 68_976_648_192,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Mixtral-8x22B-v0.1": 140_620_634_112,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
}
"""Values in the models' files, as their hub pages count them, tied ones once."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_parameters_are_the_published_ones(name: str) -> None:
    config = load_config(Backbone(path=name))
    with torch.device("meta"):
        task = build_from_config(config, Adapter(rank=1), torch.bfloat16)
    weights = task.model.shapes().values()
    assert sum(torch.Size(shape).numel() for shape in weights) == PUBLISHED[name]


def test_a_name_is_known_by_the_last_part_of_a_hub_id_in_any_case() -> None:
    one, other = (load_config(Backbone(path=p)) for p in ("SmolLM2-135M", "a/SMOLLM2-135m"))
    assert one.to_dict() == other.to_dict()


def test_a_folder_and_its_config_are_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    assert load_config(Backbone(path=str(tmp_path))).n_layer == 3
    assert load_config(Backbone(path=str(path))).n_layer == 3


def test_layers_that_take_turns_are_shortened_by_whole_turns() -> None:
    config = load_config(Backbone(path="Llama-3.1-8B"))
    assert find_layer_period(config) == 1
    assert truncate_layers(config, 3).num_hidden_layers == 3
    turns = ["full_attention", "sliding_attention"] * 16
    config = make_config({"model_type": "gemma2", "num_hidden_layers": 32, "layer_types": turns})
    assert find_layer_period(config) == 2
    assert truncate_layers(config, 4).layer_types == turns[:4]
    config.first_k_dense_replace = 1  # its first layer is another: none can be left out
    assert find_layer_period(config) == 32


WRONG = {
    "no such name": (None, "no model that is known: .*Llama-3.1-8B"),
    "no JSON": ("{", "config.json is no JSON"),
    "a list": ("[]", "names no model_type"),
    "another file's": ("{}", "names no model_type"),
    "an unknown type": ('{"model_type": "nothing"}', "model_type='nothing'"),
    "an encoder": ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "no causal"),
    "a translator": ('{"model_type": "t5"}', "no causal language model"),
    "a value of another kind": ('{"model_type": "llama", "hidden_size": "wide"}', "be read"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_language_model_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    path = "nothing-1B" if text is None else str(tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(Backbone(path=path))
    assert re.match(r"backbone.path='", str(caught.value))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_config(Backbone(path=str(tmp_path)))
