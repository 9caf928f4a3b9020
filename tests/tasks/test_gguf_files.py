"""GGUF files of a tiny Llama, written by llama.cpp's own library, against the Llama itself."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, LlamaForCausalLM

from fedgen_edge.config import Backbone
from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.backbones import gguf_files, pretrained
from fedgen_edge.tasks.language.config_only import load_config
from support.model_folders import IDS, llama, load

MERGES = [("a", "b")]
ROPE = {"rope_theta": 10000.0}
LINEAR = {**ROPE, "rope_type": "linear", "factor": 4.0}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp rotates them: convert_hf_to_gguf.py's `permute`."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(file: Path, model: LlamaForCausalLM, **how: Any) -> Path:
    """A GGUF file of a Llama.

    Args:
        file: to write.
        model: whose values it has.
        how: `header`, keys of it below "llama."; `merges` of the tokenizer; `lacks`, names of
            tensors; `more`, tensors.
    """
    config, writer = model.config, GGUFWriter(str(file), "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(how.get("blocks", config.num_hidden_layers))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in how.get("header", {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.{key}", value)
    _write_tokenizer(writer, how.get("merges", MERGES))
    _write_tensors(writer, model, how.get("lacks", ()))
    for name, values in how.get("more", {}).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_tokenizer(writer: GGUFWriter, merges: list[tuple[str, str]]) -> None:
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _write_tensors(writer: GGUFWriter, model: LlamaForCausalLM, lacks: Any) -> None:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for key, tensor in model.state_dict().items():
        values, kind = tensor.numpy(), key.split(".")[-2]
        if kind in heads:
            values = interleaved(values, getattr(model.config, heads[kind]))
        name = names.get_name(key, (".weight",))
        if name not in lacks:
            writer.add_tensor(name, values)


def toy(**shape: Any) -> LlamaForCausalLM:
    return llama(vocab_size=260, **shape)  # bytes, two marks, "ab", and transformers' own padding


def same(path: Path, model: LlamaForCausalLM) -> bool:
    with torch.no_grad():
        return torch.equal(load(path).model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["toy.gguf", "TOY.GGUF"])
def test_a_file_is_its_model_whatever_lies_beside_it(name: str, tmp_path: Path) -> None:
    model = toy()
    for other in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        (tmp_path / other).write_text("{}")
    path = write(tmp_path / name, model)
    assert same(path, model)
    assert load_config(Backbone(path=str(path))).hidden_size == 16
    assert load(path).tokenizer("ab")["input_ids"] == [len(ByteLevel.alphabet()) + 2]


def test_a_model_with_tied_embeddings_needs_no_head(tmp_path: Path) -> None:
    model = toy(tie_word_embeddings=True)
    assert same(write(tmp_path / "toy.gguf", model, lacks=["output.weight"]), model)


def test_linear_scaling_of_rotary_positions_is_carried_over(tmp_path: Path) -> None:
    model = toy(rope_parameters=LINEAR)
    header = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert same(write(tmp_path / "toy.gguf", model, header=header), model)
    # without a type, llama.cpp takes it for linear; older files have another key
    assert same(write(tmp_path / "b.gguf", model, header={"rope.scaling.factor": 4.0}), model)
    assert same(write(tmp_path / "c.gguf", model, header={"rope.scale_linear": 4.0}), model)
    none = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
    plain = toy()
    assert same(write(tmp_path / "d.gguf", plain, header=none), plain)


def llama3_divisors(width: int, factor: float) -> list[float]:
    """By what convert_hf_to_gguf.py says that Llama 3.1 and later divide rotary frequencies."""
    divisors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * ROPE["rope_theta"] ** (i / width)
        smooth = min(1.0, max(0.0, (8192 / wavelength - 1) / (4 - 1)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def test_scaling_of_llama_3_is_carried_over(tmp_path: Path) -> None:
    rope = {
        **ROPE,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = toy(head_dim=64, rope_parameters=rope)
    more = {"rope_freqs.weight": llama3_divisors(64, 8.0)}
    path = write(tmp_path / "toy.gguf", model, more=more)
    with torch.no_grad():
        ours = load(path).model(IDS).logits
        assert torch.equal(ours, model(IDS).logits)
        assert not torch.allclose(ours, with_plain_rotations(model)(IDS).logits, atol=1e-6)
    other = {"rope_freqs.weight": [d**1.5 for d in llama3_divisors(64, 8.0)]}
    with pytest.raises(ConfigError, match=r"cannot be carried over \(rope_freqs.weight\)"):
        load(write(tmp_path / "other.gguf", model, more=other))


def with_plain_rotations(model: LlamaForCausalLM) -> LlamaForCausalLM:
    values = {**model.config.to_dict(), "rope_parameters": {**ROPE, "rope_type": "default"}}
    plain = LlamaForCausalLM(AutoConfig.for_model(**values)).eval()
    plain.load_state_dict(model.state_dict())
    return plain


OTHER_SCALING = {
    "yarn": {"rope.scaling.type": RopeScalingType.YARN.value, "rope.scaling.factor": 4.0},
    "longrope": {"rope.scaling.type": RopeScalingType.LONGROPE.value},
    "attention too": {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
}


@pytest.mark.parametrize("header", OTHER_SCALING.values(), ids=OTHER_SCALING)
def test_other_scaling_is_refused_by_its_name(header: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be carried over") as caught:
        load(write(tmp_path / "toy.gguf", toy(), header=header))
    assert all(f"{key}={value}" in str(caught.value) for key, value in header.items())


PARTIAL = {
    "a weight is lacking": ({"lacks": ["blk.1.ffn_up.weight"]}, "1 weight is missing: .*1.mlp.up"),
    "a block too many": ({"blocks": 3}, r"9 weights are missing: model\.layers\.2"),
    "a block too few": ({"blocks": 1}, r"does not use \(9: blk\.1\..*, \.\.\.\)"),
    "a bias": ({"more": {"blk.0.attn_q.bias": [0.5] * 16}}, r"\(1: blk\.0\.attn_q\.bias\)"),
}


@pytest.mark.parametrize(("how", "words"), PARTIAL.values(), ids=PARTIAL)
def test_tensors_that_do_not_belong_to_the_header_are_named(
    how: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # transformers draws what is lacking, and leaves out what it does not expect
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path / "toy.gguf", toy(), **how))
    assert not [*pretrained.get_cache_folder().iterdir()]  # nothing is left behind


def test_merges_outside_the_vocabulary_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read as a GGUF .*out of vocabulary"):
        load(write(tmp_path / "toy.gguf", toy(), merges=[("zz", "qq")]))


DAMAGE = {
    "empty": lambda whole: whole[:0],
    "another file": lambda whole: whole.replace(b"GGUF", b"none"),
    "its first bytes": lambda whole: whole[:4],
    "within the header": lambda whole: whole[:200],
    "within the vocabulary": lambda whole: whole[:5000],
    "within the weights": lambda whole: whole[:-1000],
    "a later version": lambda whole: whole[:4] + b"\x63\0\0\0" + whole[8:],
    "counts": lambda whole: whole[:8] + b"\xff" * 16 + whole[24:],
    "a length": lambda whole: whole[:24] + b"\xff" * 7 + b"\x7f" + whole[32:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_line(damage: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "toy.gguf", toy())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"^backbone\.path='.*toy\.gguf' cannot be read as a G"):
        load(path)


def test_a_folder_that_holds_a_gguf_file_alone_is_told_to_give_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "Toy.GGUF", toy())
    with pytest.raises(ConfigError, match=f"backbone.path='{path}'"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=f"give the file itself, {path}"):
        load_config(Backbone(path=str(tmp_path)))


def test_a_folder_that_an_older_converter_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy(rope_parameters=LINEAR)
    path = write(tmp_path / "toy.gguf", model, header={"rope.scaling.factor": 4.0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    new = load(path).folder
    older = new.with_name(new.name.removesuffix(f"-{gguf_files.VERSION}"))
    assert older != new
    shutil.move(new, older)
    (older / "config.json").write_text("what it made")
    assert same(path, model)
