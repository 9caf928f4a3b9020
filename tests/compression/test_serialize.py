"""Bytes are lengths of what is serialised, and what arrives is what was sent."""

import math
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from fedgen_edge.adapters.full import Full
from fedgen_edge.adapters.lora import inject
from fedgen_edge.compression.serialize import count_encoded_bytes, decode, encode
from fedgen_edge.config import Adapter
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

patient = settings(deadline=None, max_examples=50)
# Names of modules are Python's identifiers, joined by points, and those may be any letters.
names = st.text(st.characters(categories=["L", "N"]) | st.sampled_from("._-: "), min_size=1)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
shaped = st.dictionaries(names, shapes, max_size=8)


def random(shapes: dict[str, Any]) -> Leaves:
    rng = generator("leaves")
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@patient
@given(shaped=shaped)
@example(shaped={})
@example(shaped={"scalar": ()})
@example(shaped={"b": (3,), "a": (2, 2), "B": (1,), "a.b": (4,)})
def test_the_length_of_shapes_is_the_length_of_their_encoding(shaped: dict[str, Any]) -> None:
    assert count_encoded_bytes(shaped) == len(encode(random(shaped)))


@patient
@given(shaped=shaped)
def test_what_is_decoded_is_what_was_encoded_bit_for_bit(shaped: dict[str, Any]) -> None:
    sent = random(shaped)
    found = decode(encode(sent))
    assert found.keys() == sent.keys()
    for name, leaf in sent.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], leaf)


def test_odd_numbers_travel_as_they_are() -> None:
    odd = torch.tensor([math.inf, -math.inf, -0.0, 1e-45, math.nan])
    found = decode(encode({"odd": odd}))["odd"]
    assert torch.equal(found.view(torch.int32), odd.view(torch.int32))


def test_the_same_leaves_are_the_same_bytes_in_any_order() -> None:
    sent = random({"b": (2,), "a": (3,)})
    assert encode(sent) == encode(dict(reversed(sent.items())))


def test_rows_of_a_stack_and_leaves_that_are_trained_can_be_sent() -> None:
    stacked = torch.arange(12.0).reshape(2, 2, 3).requires_grad_()
    found = decode(encode({"a": stacked[1], "b": stacked[0].T}))
    assert torch.equal(found["a"], torch.tensor([[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]))
    assert torch.equal(found["b"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_nothing_to_send_takes_no_bytes() -> None:
    assert encode({}) == b""
    assert decode(b"") == {}


def test_an_encoding_is_its_values_and_a_header() -> None:
    # One leaf of 6 float32: 24 bytes, and the header: 8 bytes for its length, then
    # {"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}, 57 characters, filled up to 64.
    sent = random({"w": (2, 3)})
    payload = encode(sent)
    found = decode(payload)
    assert len(payload) == 24 + 8 + 64
    assert torch.equal(found["w"], sent["w"])
    assert found["w"].data_ptr() != sent["w"].data_ptr()


def test_an_adapter_of_smollm2_saves_over_99_percent_of_a_full_model() -> None:
    # SmolLM2-135M: hidden 576; 9 heads and 3 key-value heads of 64 numbers; 30 layers.
    # q adapts 576 -> 576 and v 576 -> 192, at rank 8: 30 * 8 * (576 + 576 + 576 + 192) = 460,800.
    # Full, output layer tied: embedding 49152 * 576 = 28,311,552; each layer 2 * 576^2 (q, o)
    # + 2 * 576 * 192 (k, v) + 3 * 576 * 1536 (MLP) + 2 * 576 (norms) = 3,540,096; the last norm
    # 576: 134,515,008. 4 bytes each: 1.8 MB of 538 MB is 0.34 %.
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    full = Full(model).shapes()
    adapter = inject(model, Adapter(rank=8, target_modules=("q_proj", "v_proj"))).shapes()
    assert numbers(adapter) == 460_800
    assert numbers(full) == 134_515_008
    sent = len(encode(random(adapter)))
    assert sent == count_encoded_bytes(adapter)
    assert 1 - sent / count_encoded_bytes(full) > 0.99


def numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
