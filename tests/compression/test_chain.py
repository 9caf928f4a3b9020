"""A chain makes the bytes that were computed, and a receiver takes those and no others."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from fedgen_edge.compression.chain import (
    Chain,
    Schema,
    compress,
    compress_with_feedback,
    count_bits_per_value,
    count_part_bytes,
    decompress,
    get_max_bytes,
)
from fedgen_edge.compression.packing import Zstd
from fedgen_edge.compression.quantize import Cast, Quantize
from fedgen_edge.compression.serialize import encode
from fedgen_edge.compression.sparsify import RandomK, TopK
from fedgen_edge.errors import ConfigError, RefusedError, TrainingError
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

SPARSIFIERS = [(), (TopK(0.05),), (TopK(0.4),), (RandomK(0.3, scaled=False),), (RandomK(0.3),)]
CODERS = [(), (Cast("fp16"),), (Cast("bf16"),), (Quantize(8),), (Quantize(4, block=7),)]
CHAINS = [Chain(s + c) for s, c in itertools.product(SPARSIFIERS, CODERS)]
names = st.text(st.characters(categories=["L", "N"]) | st.sampled_from("._-"), min_size=1)
shaped = st.dictionaries(names, st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=6)


def random(schema: Schema, key: int | str = 0) -> Leaves:
    rng = generator("leaves", key)
    return {name: torch.randn(shape, generator=rng) / 100 for name, shape in schema.items()}


def sent(chain: Chain, leaves: Leaves, key: int = 0) -> bytes:
    return compress(chain, leaves, generator("round", key), 7)


def flat(leaves: Leaves) -> Tensor:
    return torch.cat([leaves[k].flatten() for k in sorted(leaves)])


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(CHAINS), st.booleans(), shaped)
def test_leaves_arrive_whole_in_as_many_bytes_as_were_computed(
    chain: Chain, shortened: bool, schema: Schema
) -> None:
    leaves = random(schema)
    payload = sent(chain, leaves)
    assert (
        len(payload)
        == sum(count_part_bytes(chain, schema).values())
        == get_max_bytes(chain, schema)
    )
    found = decompress(chain, payload, schema, 7)
    assert list(found) == sorted(schema)
    assert all(leaf.shape == schema[k] for k, leaf in found.items())
    assert all(leaf.dtype == torch.float32 for leaf in found.values())
    if found and not chain.stages:
        assert torch.equal(flat(found), flat(leaves))
    if shortened:
        shorter = Chain((*chain.stages, Zstd()))
        again = sent(shorter, leaves)
        assert len(again) <= get_max_bytes(shorter, schema)
        unpacked = decompress(shorter, again, schema, 7)
        assert all(torch.equal(unpacked[k], v) for k, v in found.items())


def test_top_k_is_over_all_leaves_together_in_the_order_of_names() -> None:
    leaves = {"b": torch.tensor([[1.0, 9.0]]), "a": torch.tensor([0.5, -8.0]), "c": torch.ones(())}
    chain = Chain((TopK(0.4),))
    found = decompress(chain, sent(chain, leaves), {"c": (), "a": (2,), "b": (1, 2)}, 7)
    assert found["a"].tolist() == [0.0, -8.0]
    assert found["b"].tolist() == [[0.0, 9.0]]
    assert found["c"].tolist() == 0.0


def test_blocks_are_over_all_leaves_together() -> None:
    # The block of 4 ends within b, so 0.5 and 4 have the scale 4, and 0.25 its own.
    leaves = {"a": torch.tensor([0.0, 0.0, 4.0]), "b": torch.tensor([4.0, 0.25])}
    payload = sent(Chain((Quantize(8, block=4),)), leaves)
    assert load(payload)["scales"].tolist() == [4.0, 0.25]


def test_a_chain_is_its_stages_one_after_another() -> None:
    # Of four values 3 and -1 are kept, and their block's scale is 3, so 3 is exact and -1 is a
    # multiple of 3 / 127 next to it: -42 or -43 of them.
    chain = Chain((TopK(0.5), Quantize(8)))
    leaf = torch.tensor([0.5, -1.0, 3.0, 0.2])
    found = decompress(chain, sent(chain, {"a": leaf}), {"a": (4,)}, 7)["a"]
    assert found[[0, 2, 3]].tolist() == [0.0, 3.0, 0.0]
    assert round(float(found[1] * 127 / 3), 4) in {-42.0, -43.0}


def test_what_arrives_can_be_saved_and_shares_no_memory() -> None:
    schema = {"a": (3,), "b": (2, 2)}
    found = decompress(Chain(), sent(Chain(), random(schema)), schema, 7)
    assert encode(found)
    assert found["a"].untyped_storage().nbytes() == 12


def test_the_same_leaves_are_the_same_bytes_and_another_key_other_ones() -> None:
    leaves = random({"b": (40,), "a": (30, 2)})
    chain = Chain((TopK(0.3), Quantize(4), Zstd()))
    assert sent(chain, leaves) == sent(chain, dict(reversed(leaves.items())))
    assert sent(chain, leaves, 1) != sent(chain, leaves, 2)


def test_leaves_that_are_trained_or_views_are_sent() -> None:
    leaf = torch.arange(6.0).reshape(2, 3).requires_grad_()
    found = decompress(Chain(), sent(Chain(), {"a": leaf.T}), {"a": (3, 2)}, 7)
    assert torch.equal(found["a"], leaf.detach().T)


@pytest.mark.parametrize(("block", "each"), [(64, 8.25), (128, 8.125), (256, 8.0625)])
def test_int8_takes_eight_bits_a_value_and_sixteen_a_block(block: int, each: float) -> None:
    # 460,800 values, an adapter of SmolLM2's q and v at rank 8; the header's 136 bytes, told by
    # {"scales":...,"values":...}, are 0.002 bits a value.
    schema = {"a": (460_800,)}
    chain = Chain((Quantize(8, block),))
    payload = sent(chain, random(schema))
    assert count_part_bytes(chain, schema)["scales"] == 2 * 460_800 // block
    assert count_part_bytes(chain, schema)["values"] == 460_800
    assert 0 < count_bits_per_value(len(payload), schema) - each < 0.003


def test_bytes_of_a_sparse_int4_payload_by_hand() -> None:
    # 10,000 values, 100 kept: floor(log2(100)) = 6 low bits, and 100 + 9999 // 64 = 256 bits of
    # gaps: (600 + 256) / 8 = 107 bytes. Scales 2 * 1, values 50. The header:
    # {"scales":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},
    #  "gaps":{"dtype":"U8","shape":[107],"data_offsets":[2,109]},
    #  "values":{"dtype":"U8","shape":[50],"data_offsets":[109,159]}}
    # is 58 + 1 + 58 + 1 + 60 and two braces, 180 characters: 184 of them, and 8 for their number.
    schema = {"a": (100, 100)}
    chain = Chain((TopK(0.01), Quantize(4)))
    assert count_part_bytes(chain, schema) == {
        "header": 192,
        "gaps": 107,
        "scales": 2,
        "values": 50,
    }
    assert len(sent(chain, random(schema))) == 192 + 107 + 2 + 50


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ((Quantize(8), TopK(0.1)), "int8, top-k"),
        ((Zstd(), Quantize(4)), "zstd, int4"),
        ((Cast("fp16"), Quantize(8)), "fp16, int8"),
        ((TopK(0.1), RandomK(0.1)), "top-k, random-k"),
        ((Cast("bf16"), Zstd(), Zstd()), "bf16, zstd, zstd"),
    ],
)
def test_an_order_that_cannot_be_is_one_line_with_its_stages(
    stages: tuple[TopK | RandomK | Cast | Quantize | Zstd, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^stages={named} cannot be in this order") as found:
        Chain(stages)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_not_finite_is_not_sent(value: float) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        sent(Chain((TopK(0.5),)), {"a": torch.tensor([1.0, value])})


SCHEMA = {"a": (40, 5), "b": (9,)}
PLAIN, SPARSE, DENSE = Chain(), Chain((TopK(0.05), Quantize(8))), Chain((TopK(0.5), Quantize(4)))


def altered(chain: Chain, change: Callable[[Leaves], object]) -> bytes:
    parts = load(sent(chain, random(SCHEMA)))
    change(parts)
    return save(parts)


def put(name: str, at: int, value: float) -> Callable[[Leaves], object]:
    return lambda parts: parts[name].__setitem__(at, value)


ATTACKS = {
    "no bytes": (SPARSE, "wrong-length", b""),
    "another chain's": (SPARSE, "wrong-length", sent(DENSE, random(SCHEMA))),
    "a leaf too many": (SPARSE, "wrong-length", sent(SPARSE, random({**SCHEMA, "c": (99,)}))),
    "a part too many": (
        SPARSE,
        "wrong-length",
        altered(SPARSE, lambda p: p.update(more=torch.ones(1))),
    ),
    "a part too few": (SPARSE, "wrong-length", altered(SPARSE, lambda p: p.pop("scales"))),
    "another name": (
        SPARSE,
        "bad-header",
        altered(SPARSE, lambda p: p.update(scalez=p.pop("scales"))),
    ),
    "another type": (
        SPARSE,
        "bad-header",
        altered(SPARSE, lambda p: p.update(scales=p["scales"].view(torch.bfloat16))),
    ),
    "another shape": (
        PLAIN,
        "wrong-length",
        altered(PLAIN, lambda p: p.update(values=p["values"].reshape(11, 19))),
    ),
    "NaN as a scale": (SPARSE, "bad-values", altered(SPARSE, put("scales", 0, math.nan))),
    "a negative scale": (DENSE, "bad-values", altered(DENSE, put("scales", 0, -1))),
    "a code of -128": (SPARSE, "bad-values", altered(SPARSE, put("values", 3, -128))),
    "a code of -8": (DENSE, "bad-values", altered(DENSE, put("values", 3, 8))),
    "half a code too many": (DENSE, "bad-values", altered(DENSE, put("values", 52, 0x11))),
    "more gaps": (SPARSE, "bad-positions", altered(SPARSE, put("gaps", 0, 255))),
    "more ones": (DENSE, "bad-positions", altered(DENSE, lambda p: p["bitmap"][:26].fill_(255))),
    "ones after the end": (DENSE, "bad-positions", altered(DENSE, put("bitmap", 26, 255))),
    "infinity": (PLAIN, "not-finite", altered(PLAIN, put("values", 0, math.inf))),
    "not a number": (PLAIN, "not-finite", altered(PLAIN, put("values", 208, math.nan))),
    "values for nobody": (SPARSE, "wrong-length", b"x"),
}


@pytest.mark.parametrize(("chain", "code", "payload"), ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("shortened", [False, True])
def test_what_was_altered_is_refused_with_its_code(
    chain: Chain, code: str, payload: bytes, shortened: bool
) -> None:
    assert decompress(chain, sent(chain, random(SCHEMA)), SCHEMA, 7)
    if shortened:
        chain, payload = Chain((*chain.stages, Zstd())), Zstd().encode(payload)
    with pytest.raises(RefusedError) as refusal:
        decompress(chain, payload, SCHEMA, 7)
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("chain", [PLAIN, SPARSE, DENSE, Chain((*SPARSE.stages, Zstd()))])
def test_a_payload_cut_or_drawn_out_anywhere_is_refused(chain: Chain) -> None:
    payload = sent(chain, random(SCHEMA))
    for changed in (*(payload[:n] for n in range(len(payload))), payload + b"\0", payload * 2):
        with pytest.raises(RefusedError):
            decompress(chain, changed, SCHEMA, 7)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([PLAIN, SPARSE, DENSE]), st.data())
def test_any_values_behind_the_right_header_are_finite_leaves_or_refused(
    chain: Chain, data: st.DataObject
) -> None:
    whole = count_part_bytes(chain, SCHEMA)
    head = sent(chain, random(SCHEMA))[: whole["header"]]
    size = sum(whole.values()) - len(head)
    payload = head + data.draw(st.binary(min_size=size, max_size=size))
    try:
        found = decompress(chain, payload, SCHEMA, 7)
    except RefusedError:
        return
    assert {k: tuple(v.shape) for k, v in found.items()} == SCHEMA
    assert flat(found).isfinite().all()


def test_nothing_to_send_takes_no_bytes_and_none_are_taken() -> None:
    for schema in ({}, {"a": (0, 3)}):
        for chain in (PLAIN, Chain((TopK(0.1), Zstd()))):
            assert sent(chain, random(schema)) == b""
            assert get_max_bytes(chain, schema) == 0
            assert {
                k: tuple(v.shape) for k, v in decompress(chain, b"", schema, 7).items()
            } == schema
            with pytest.raises(RefusedError, match=r"^wrong-length"):
                decompress(chain, b"x", schema, 7)


@pytest.mark.parametrize(
    "chain",
    [
        SPARSE,
        DENSE,
        Chain((RandomK(0.2, scaled=False), Cast("bf16"), Zstd())),
        Chain((Quantize(4),)),
    ],
    ids=lambda c: ", ".join(s.name for s in c.stages),
)
def test_without_decay_what_arrived_and_what_is_left_are_all_changes(chain: Chain) -> None:
    residual: Leaves = {}
    arrived = total = torch.zeros(209)
    rng = generator("feedback")
    for key in range(20):
        delta = random(SCHEMA, key)
        payload, residual = compress_with_feedback(chain, delta, residual, 1.0, rng, key)
        arrived = arrived + flat(decompress(chain, payload, SCHEMA, key))
        total = total + flat(delta)
    torch.testing.assert_close(arrived + flat(residual), total, rtol=0, atol=1e-6)
    assert not torch.allclose(arrived, total, rtol=0, atol=1e-4)
