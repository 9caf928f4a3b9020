import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.compression.serialize import encode
from fedgen_edge.compression.wire import (
    LAST_ROUND_KEY,
    RESIDUAL_PREFIX,
    Wire,
    decode_broadcast,
    decode_update,
    encode_broadcast,
    encode_update,
    get_error_factor,
    get_max_bytes_down,
    get_max_bytes_up,
    make_wire,
)
from fedgen_edge.config import Compression, from_table
from fedgen_edge.errors import ConfigError, RefusedError, TrainingError
from fedgen_edge.leaves import norm, shapes
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "int8", "block": 16},
    "int4": {"dtype": "int4", "block": 16},
    "top-k": {"sparsify": "top-k", "density": 0.2},
    "top-k, int8, zstd": {"sparsify": "top-k", "density": 0.2, "dtype": "int8", "zstd": 3},
}
UPWARDS: dict[str, dict[str, Any]] = {
    **WAYS,
    "random-k": {"sparsify": "random-k", "density": 0.3},
    "random-k, int4": {"sparsify": "random-k", "density": 0.3, "dtype": "int4"},
    "low-rank": {"low_rank": 1},
    "low-rank, int8": {"low_rank": 1, "dtype": "int8"},
}


def line(**up: Any) -> Wire:
    return make_wire(Compression(**up), Compression(), 0, {})


def vector(*values: float) -> Leaves:
    return {"x": torch.tensor(values)}


def drawn(seed: int) -> Leaves:
    rng = generator("drawn", seed)
    return {k: torch.randn(s, generator=rng) for k, s in (("b", (9, 7)), ("a", (5,)))}


def test_without_a_chain_leaves_go_as_they_are_by_name() -> None:
    on, sent = line(), vector(1, 2)
    assert encode_update(on, sent, {}, 0, 0) == (encode(sent), {})
    assert encode_broadcast(on, sent, 0) == encode(sent)
    assert torch.equal(decode_update(on, encode(sent), shapes(sent), 0, 0)["x"], sent["x"])
    assert torch.equal(decode_broadcast(on, encode(sent), shapes(sent))["x"], sent["x"])


def test_down_goes_the_change_since_the_first_round() -> None:
    # fp16 holds 11 bits: of 1024 + 1/1024 the change, but not the sum
    base, now = vector(1024.0, 3.0), vector(1024.0 + 1 / 1024, 3.0)
    on = make_wire(Compression(), Compression(dtype="fp16"), 0, base)
    found = decode_broadcast(on, encode_broadcast(on, now, 0), shapes(now))
    assert torch.equal(found["x"], now["x"])
    assert not torch.equal(now["x"].half().float(), now["x"])


def test_what_did_not_change_most_arrives_as_it_began() -> None:
    base, now = vector(5.0, 5.0, 5.0, 5.0), vector(5.1, 9.0, 5.2, 1.5)
    on = make_wire(Compression(), Compression(sparsify="top-k", density=0.5), 0, base)
    assert decode_broadcast(on, encode_broadcast(on, now, 0), shapes(now))["x"].tolist() == [
        5,
        9,
        5,
        1.5,
    ]


def test_what_was_left_out_comes_with_the_next_change() -> None:
    on = line(sparsify="top-k", density=0.5, feedback=True, decay=0.5)
    payload, kept = encode_update(on, vector(3, 1), {}, 4, 0)
    assert decode_update(on, payload, {"x": (2,)}, 4, 0)["x"].tolist() == [3, 0]
    assert kept[RESIDUAL_PREFIX + "x"].tolist() == [0, 1]
    assert float(kept[LAST_ROUND_KEY]) == 4
    # in the next round all of it counts: 1 + 0.25; two rounds later, having missed one, half of it
    for round_, expected in ((5, 1.25), (6, 0.75), (7, 0.5)):
        payload, after = encode_update(on, vector(0, 0.25), kept, round_, 0)
        assert decode_update(on, payload, {"x": (2,)}, round_, 0)["x"].tolist() == [0, expected]
        assert after[RESIDUAL_PREFIX + "x"].tolist() == [0, 0]


def test_what_is_left_of_leaves_that_rest_stays() -> None:
    on = line(sparsify="top-k", density=0.5, feedback=True)
    _, kept = encode_update(on, vector(3, 1), {}, 0, 0)
    _, more = encode_update(on, {"y": torch.tensor([2.0, 1.0])}, kept, 1, 0)
    assert {**kept, **more}.keys() == {LAST_ROUND_KEY, RESIDUAL_PREFIX + "x", RESIDUAL_PREFIX + "y"}


@pytest.mark.parametrize("how", UPWARDS)
def test_a_payload_is_no_longer_than_is_said_and_repeats(how: str) -> None:
    on, delta = line(**UPWARDS[how]), drawn(0)
    payload, _ = encode_update(on, delta, {}, 3, 1)
    assert len(payload) <= get_max_bytes_up(on, shapes(delta))
    assert encode_update(on, delta, {}, 3, 1)[0] == payload
    found = decode_update(on, payload, shapes(delta), 3, 1)
    assert shapes(found) == shapes(delta)
    assert [*found] == sorted(found)


@pytest.mark.parametrize("how", WAYS)
def test_downwards_too(how: str) -> None:
    on, now = make_wire(Compression(), Compression(**WAYS[how]), 0, drawn(1)), drawn(2)
    payload = encode_broadcast(on, now, 3)
    assert len(payload) <= get_max_bytes_down(on, shapes(now))
    assert encode_broadcast(on, now, 3) == payload
    assert shapes(decode_broadcast(on, payload, shapes(now))) == shapes(now)


def test_clients_and_rounds_draw_other_places_and_other_roundings() -> None:
    for how in ({"sparsify": "random-k", "density": 0.3}, {"dtype": "int4"}):
        on, delta = line(**how), drawn(0)
        sent = {encode_update(on, delta, {}, r, c)[0] for r, c in ((0, 0), (0, 1), (1, 0))}
        assert len(sent) == 3


@given(st.sampled_from([k for k in UPWARDS if "low-rank" not in k]), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_nothing_seems_to_move_farther_than_the_stretch_says(how: str, seed: int) -> None:
    on, delta = line(**UPWARDS[how]), drawn(seed)
    payload, _ = encode_update(on, delta, {}, seed, 0)
    found = decode_update(on, payload, shapes(delta), seed, 0)
    furthest = max(float(v.abs().max()) for v in delta.values())
    assert all(float(v.abs().max()) <= get_error_factor(on) * furthest for v in found.values())
    assert float(norm(found)) <= get_error_factor(on) * float(norm(delta))
    assert get_error_factor(line()) == 1


@given(st.sampled_from(["top-k", "int8", "top-k, int8, zstd"]), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_feedback_never_seems_to_move_farther_than_all_rounds_did(how: str, seed: int) -> None:
    on, kept, total = line(**UPWARDS[how], feedback=True, decay=1.0), {}, 0.0
    for round_ in range(6):
        delta = {k: v.clamp(-0.1, 0.1) for k, v in drawn(seed + round_).items()}
        total += 0.1
        payload, kept = encode_update(on, delta, kept, round_, 0)
        found = decode_update(on, payload, shapes(delta), round_, 0)
        assert all(float(v.abs().max()) <= get_error_factor(on) * total for v in found.values())


def test_where_no_bound_is_known_the_stretch_is_endless() -> None:
    assert get_error_factor(line(low_rank=1)) == math.inf
    assert get_error_factor(line(dtype="int4", block=128, feedback=True)) == math.inf
    assert get_error_factor(line(dtype="int4", block=16, feedback=True)) < 2


def test_a_leaf_of_few_ranks_arrives_whole_and_others_as_their_closest_product() -> None:
    rng = generator("ranks")
    one = torch.randn(9, 1, generator=rng) @ torch.randn(1, 7, generator=rng)
    full, bias = torch.randn(9, 7, generator=rng), torch.randn(5, generator=rng)
    on, delta = line(low_rank=1), {"one": one, "full": full.reshape(9, 7, 1, 1), "bias": bias}
    payload, _ = encode_update(on, delta, {}, 0, 0)
    found = decode_update(on, payload, shapes(delta), 0, 0)
    torch.testing.assert_close(found["one"], one)
    assert torch.equal(found["bias"], bias)
    left, values, right = torch.linalg.svd(full)
    closest = values[0] * left[:, :1] @ right[:1]
    torch.testing.assert_close(found["full"].reshape(9, 7), closest)
    # (9 + 7) * 2 + 5 values for 131
    assert len(payload) < 4 * 37 + 120


def test_a_matrix_that_its_factors_would_not_shorten_goes_as_it_is() -> None:
    delta = {"x": torch.eye(4)}
    payload, _ = encode_update(line(low_rank=2), delta, {}, 0, 0)
    decoded = decode_update(line(low_rank=2), payload, {"x": (4, 4)}, 0, 0)
    assert torch.equal(decoded["x"], delta["x"])


def test_factors_whose_product_is_not_finite_are_refused() -> None:
    on, huge = line(low_rank=1), {"x": torch.ones(5, 5)}
    payload, _ = encode_update(on, huge, {}, 0, 0)
    worse = payload[:-40] + torch.full((10,), 3e38).numpy().tobytes()
    with pytest.raises(RefusedError, match="not-finite"):
        decode_update(on, worse, {"x": (5, 5)}, 0, 0)


def test_a_change_that_is_not_finite_is_not_sent() -> None:
    for how in ({"dtype": "int8"}, {"low_rank": 1}):
        with pytest.raises(TrainingError, match="not finite"):
            encode_update(line(**how), {"x": torch.full((5, 5), math.nan)}, {}, 0, 0)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"uplink": {"feedback": True}}, "uplink.feedback=true has nothing to give back"),
        ({"uplink": {"density": 0}}, "uplink.density=0"),
        ({"downlink": {"sparsify": "random-k"}}, "downlink.sparsify='random-k'"),
        ({"uplink": {"dtype": "int2"}}, "uplink.dtype='int2'"),
        ({"downlink": {"zstd": 20}}, "downlink.zstd=20"),
    ],
)
def test_a_wrong_setting_is_one_line(table: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_table(table)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
