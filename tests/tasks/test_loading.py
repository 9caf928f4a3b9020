"""Folders of models: what plain transformers makes of whole ones, and one line for all others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel, WordPiece
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedgen_edge.config import Backbone, from_table
from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.language.config_only import load_config
from fedgen_edge.tasks.language.task import check_length
from support.model_folders import IDS, SHAPE, change_json, change_weights, llama, load, save


def complaint(call: Callable[[], Any]) -> str:
    """The one line of a mistake."""
    with pytest.raises(ConfigError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


def without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {k: v for k, v in weights.items() if part not in k}


def renamed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {prefix + k: v for k, v in weights.items()}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2)).eval()


def as_published(weights: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's first files have no prefix and no head, and a buffer of the mask."""
    plain = {k.removeprefix("transformer."): v for k, v in weights.items()}
    return {**plain, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}


def with_frequencies(weights: dict[str, Any]) -> dict[str, Any]:
    """Llama's first files hold the frequencies of rotary positions."""
    return {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


WHOLE = {
    "plain": (llama, dict),
    "tied": (lambda: llama(tie_word_embeddings=True), dict),
    "old buffers": (llama, with_frequencies),
    "GPT-2's first files": (gpt2, as_published),
}


@pytest.mark.parametrize(("make", "change"), WHOLE.values(), ids=WHOLE)
def test_a_whole_model_computes_what_it_did(
    make: Callable[[], PreTrainedModel], change: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = make()
    change_weights(save(model, tmp_path), change)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)


# a layer of a Llama has nine weights: q, k, v, o, gate, up, down, and two norms; all are 9 L + 3
PARTIAL = {
    "a weight is lacking": (without("layers.1.mlp.up"), {}, ["1 weight is missing", "1.mlp.up_"]),
    "the head is lacking": (without("lm_head"), {}, ["1 weight is missing", "lm_head.weight"]),
    "other names": (
        renamed("module."),
        {},
        ["21 weights are missing", "21 weights are not used", "module.lm_head.weight", ", ..."],
    ),
    "a layer too many": (dict, {"num_hidden_layers": 3}, ["9 weights are missing", "layers.2."]),
    "a layer too few": (dict, {"num_hidden_layers": 1}, ["9 weights are not used", "layers.1."]),
    "other sizes": (
        dict,
        {"intermediate_size": 20},
        ["6 weights are of another size", "[16, 24] in the file, [16, 20] by its configuration"],
    ),
    "other heads": (dict, {"num_key_value_heads": 2}, ["4 weights are of another size"]),
}


@pytest.mark.parametrize(("change", "values", "words"), PARTIAL.values(), ids=PARTIAL)
def test_weights_that_do_not_belong_to_the_configuration_are_named(
    change: Callable[[Any], Any], values: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    change_weights(save(llama(), tmp_path), change)
    change_json(tmp_path / "config.json", **values)
    line = complaint(lambda: load(tmp_path))
    assert line.startswith(f"backbone.path='{tmp_path}'")
    assert all(word in line for word in words)


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    save(LlamaForSequenceClassification(LlamaConfig(**SHAPE)), tmp_path)
    line = complaint(lambda: load(tmp_path))
    assert "lm_head.weight" in line
    assert "1 weight is not used: score.weight" in line


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "new"])
def test_a_quantized_model_is_refused_by_its_method(method: str, tmp_path: Path) -> None:
    save(llama(), tmp_path)
    change_json(tmp_path / "config.json", quantization_config={"quant_method": method})
    (tmp_path / "model.safetensors").write_bytes(b"is not read")
    for line in (
        complaint(lambda: load(tmp_path)),
        complaint(lambda: load_config(Backbone(path=str(tmp_path)))),
    ):
        assert f"is quantized ({method}" in line


IMPOSSIBLE = {
    "a word for a number": {"hidden_size": "wide"},
    "no number": {"vocab_size": None},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 3},
    "an unknown activation": {"hidden_act": "none such"},
    "unknown positions": {"rope_scaling": {"rope_type": "none such"}},
    "unknown layers": {"layer_types": ["none such"]},
    "an unknown type": {"dtype": "none such"},
    "an unknown model": {"model_type": "none-such"},
    "a translator": {"model_type": "t5"},
}


@pytest.mark.parametrize("values", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_configuration_is_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    save(llama(), tmp_path)
    change_json(tmp_path / "config.json", **values)
    assert "is no causal language model" in complaint(lambda: load(tmp_path))


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", "[" * 100_000])
def test_a_configuration_that_is_none_is_one_line(text: str | None, tmp_path: Path) -> None:
    save(llama(), tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for line in (
        complaint(lambda: load(tmp_path)),
        complaint(lambda: load_config(Backbone(path=str(tmp_path)))),
    ):
        assert "config.json" in line


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_sent_to_the_adapters_setting(
    whole: bool, tmp_path: Path
) -> None:
    # transformers would load the adapter into the model, and name neither
    model = llama()
    if whole:
        save(model, tmp_path)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "adapter.initial" in complaint(lambda: load(tmp_path))


def write_code(folder: Path) -> Path:
    """A Python file beside a model, which leaves a mark where it runs."""
    mark = folder / "it-ran"
    (folder / "its_code.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer\n"
        "OtherConfig, OtherForCausalLM, OtherTokenizer = LlamaConfig, LlamaForCausalLM, "
        "LlamaTokenizer\n"
    )
    return mark


OTHERS = {
    "a class of its own": {"AutoModelForCausalLM": "its_code.OtherForCausalLM"},
    "a configuration of its own": {"AutoConfig": "its_code.OtherConfig"},
    "another folder's class": {"AutoModelForCausalLM": "team/model--its_code.OtherForCausalLM"},
}


@pytest.mark.parametrize("kind", ["llama", "its-own"])
@pytest.mark.parametrize("classes", OTHERS.values(), ids=OTHERS)
def test_a_model_that_needs_its_folders_code_is_refused_without_a_question(
    kind: str, classes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(llama(), tmp_path)
    mark = write_code(tmp_path)
    change_json(tmp_path / "config.json", auto_map=classes, model_type=kind)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    for line in (
        complaint(lambda: load(tmp_path)),
        complaint(lambda: load_config(Backbone(path=str(tmp_path)))),
    ):
        assert "needs Python code of its own" in line
    assert not mark.exists()


def test_code_of_an_architecture_that_transformers_has_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    save(model, tmp_path)
    mark = write_code(tmp_path)
    names = {"AutoConfig": "LlamaConfig", "AutoModelForCausalLM": "LlamaForCausalLM"}
    classes = {kind: f"its_code.{name}" for kind, name in names.items()}
    change_json(tmp_path / "config.json", auto_map=classes)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)
    assert not mark.exists()


@pytest.mark.parametrize("declared", ["OtherTokenizer", "LlamaTokenizer", "TokenizersBackend"])
def test_a_tokenizer_that_needs_its_folders_code_is_refused(declared: str, tmp_path: Path) -> None:
    # transformers would take the class that is declared, or its own for tokenizer.json, instead
    save(llama(), tmp_path)
    mark = write_code(tmp_path)
    classes = {"AutoTokenizer": ["its_code.OtherTokenizer", None]}
    change_json(tmp_path / "tokenizer_config.json", auto_map=classes, tokenizer_class=declared)
    line = complaint(lambda: load(tmp_path))
    assert "its tokenizer needs Python code of its own (OtherTokenizer" in line
    assert not mark.exists()


NO_UNKNOWN = {
    "words": WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"),
    "pieces": WordPiece({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"),
    "unigrams": Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)]),
}


@pytest.mark.parametrize("model", NO_UNKNOWN.values(), ids=NO_UNKNOWN)
def test_a_tokenizer_that_fails_at_unknown_words_is_one_line(model: Any, tmp_path: Path) -> None:
    save(llama(), tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    line = complaint(lambda: load(tmp_path))
    assert "its tokenizer cannot be used" in line
    assert "unk" in line.lower()


def test_a_tokenizer_with_an_unknown_token_is_used(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    words = WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer("b")["input_ids"] == [2]


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_damaged_tokenizer_is_one_line(text: str | None, tmp_path: Path) -> None:
    save(llama(), tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    assert "its tokenizer cannot be used" in complaint(lambda: load(tmp_path))


def test_a_tokenizers_configuration_that_is_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert "its tokenizer cannot be used" in complaint(lambda: load(tmp_path))


def test_plain_transformers_draws_what_a_folder_lacks(tmp_path: Path) -> None:
    # why all of the above is checked: two loads of one folder, two models, and no error
    change_weights(save(llama(), tmp_path), without("lm_head"))
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight for _ in range(2))
    assert not torch.equal(one, two)


def test_no_memory_left_is_not_blamed_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(llama(), tmp_path / "llama")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(2**48)
    )
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pretrained.load(Backbone(path=str(folder)), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2"])
def test_masks_that_older_versions_saved_are_passed_over_and_weights_are_not(
    tmp_path: Path, kind: str
) -> None:
    shape = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1}
    model = (
        GPT2LMHeadModel(GPT2Config(**shape, n_embd=16, n_layer=1, n_head=2, n_positions=64))
        if kind == "gpt2"
        else GPTNeoForCausalLM(
            GPTNeoConfig(**shape, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16,
                         attention_types=[[["local"], 1]], window_size=8,
                         max_position_embeddings=64)
        )
    ).eval()  # fmt: skip
    folder = save(model, tmp_path / kind)
    layer = "transformer.h.0.attn" + (".attention" if kind == "gpt_neo" else "")
    mask = torch.ones(1, 1, 64, 64).tril()
    seen = {f"{layer}.bias": mask - mask.tril(-8), f"{layer}.masked_bias": torch.tensor(-1e9)}
    change_weights(folder, lambda weights: weights | seen)
    with torch.no_grad():
        assert torch.equal(load(folder).model(IDS).logits, model(IDS).logits)
    for wrong in (torch.randn(1, 1, 64, 64), torch.ones(1, 1, 64, 64), torch.ones(16)):
        change_weights(
            folder, lambda weights, wrong=wrong: weights | {f"{layer}.masked_bias": wrong}
        )
        with pytest.raises(ConfigError, match=r"1 weight is not used: .*masked_bias"):
            load(folder)


def test_more_layers_than_tensors_are_refused_before_they_are_made(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "deep")
    change_json(folder / "config.json", num_hidden_layers=100)
    with pytest.raises(ConfigError, match=r"num_hidden_layers=100 in its config.json is above"):
        load(folder)


def test_a_length_that_is_no_number_is_one_line() -> None:
    config = LlamaConfig(**SHAPE, sliding_window="x")  # a field that Llama's does not declare
    with pytest.raises(ConfigError, match=r"sliding_window='x' in its config.json is no whole"):
        check_length(from_table({}), config)
