import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgen_edge.data import batches
from fedgen_edge.data.batches import (
    Budget,
    Shard,
    Shards,
    count_rows,
    count_steps,
    interleave,
    make_batches,
    pack,
    stack,
    subsample_evenly,
)


def test_every_token_but_each_documents_first_is_predicted_once() -> None:
    # [9 1 2 8] predicts 1 2 8; [9 3 8] predicts 3 8: five labels in blocks of four.
    packed = pack([[9, 1, 2, 8], [9, 3, 8]], [3, 2], 4)
    assert packed["tokens"].tolist() == [[9, 1, 2, 9], [3, 0, 0, 0]]
    assert packed["labels"].tolist() == [[1, 2, 8, 3], [8, 0, 0, 0]]
    assert packed["mask"].tolist() == [[True] * 4, [True, False, False, False]]
    assert packed["segment"].tolist() == [[1, 1, 1, 2], [1, 0, 0, 0]]
    assert packed["position"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    # three words over three labels, two over two: the block with four labels has four.
    assert packed["words"].tolist() == [4, 1]


@given(
    st.lists(st.lists(st.integers(2, 50), min_size=2, max_size=30), min_size=1, max_size=12),
    st.integers(2, 16),
)
def test_packing_loses_and_doubles_no_label_and_no_word(
    documents: list[list[int]], length: int
) -> None:
    packed = pack(documents, [len(d) for d in documents], length)
    labels = packed["labels"][packed["mask"]].tolist()
    assert labels == [token for document in documents for token in document[1:]]
    assert int(packed["words"].sum()) == sum(len(d) for d in documents)
    assert count_rows(packed) == -(-len(labels) // length)


@pytest.mark.parametrize(
    ("vocabulary", "kind"), [(2**15, torch.int16), (2**15 + 1, torch.int32), (50000, torch.int32)]
)
def test_numbers_of_few_words_take_two_bytes(vocabulary: int, kind: torch.dtype) -> None:
    highest = vocabulary - 1
    packed = pack([[0, highest, 1]], [1], 4, vocabulary)
    assert packed["tokens"].dtype == packed["labels"].dtype == kind
    assert packed["labels"].tolist() == [[highest, 1, 0, 0]]


@pytest.mark.parametrize(("length", "kind"), [(255, torch.uint8), (256, torch.int16)])
def test_places_in_a_short_block_take_one_byte(length: int, kind: torch.dtype) -> None:
    # as many documents as places: the last one's number is the length
    packed = pack([[0, 1]] * length, [1] * length, length)
    assert packed["position"].dtype == packed["segment"].dtype == kind
    assert packed["segment"].tolist() == [list(range(1, length + 1))]


def test_a_client_costs_its_blocks_and_no_tensor_of_its_own() -> None:
    # A place has 7 bytes: token and label 2 each, mask, segment and position 1 each; a block 4 more
    # for its words. Three parts of one block of 4 places: 3 * (4 * 7 + 4) bytes a client.
    block = pack([[0, 1, 2, 3, 500]], [4], 4, 512)
    clients = 2 * batches.SHARDS_PER_TABLE
    table = Shards(Shard(str(n), block, block, block) for n in range(clients))
    leaves = [v for own in table for part in (own.train, own.test) for v in part.values()]
    held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in leaves}
    assert sum(held.values()) == clients * 3 * (4 * 7 + 4)
    assert len(held) == 2 * len(block)


def test_clients_in_tables_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SHARDS_PER_TABLE", 3)

    def batch(count: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(9, (count, 4), dtype=torch.int32)
        return {"tokens": tokens, "mask": tokens > 4, "words": tokens.sum(1)}

    own = [Shard(f"c{n}", batch(n + 1), batch(n), batch(2)) for n in range(4)]
    table = Shards(iter(own))
    assert len(table) == 4
    for before, after in zip(own, table, strict=True):
        assert (after.name, after.weight) == (before.name, before.weight)
        for part in ("train", "validation", "test"):
            was, now = getattr(before, part), getattr(after, part)
            assert was.keys() == now.keys()
            assert all(torch.equal(was[k], now[k]) and was[k].dtype == now[k].dtype for k in was)
    assert [shard.name for shard in table[1:3]] == ["c1", "c2"]
    assert table[-1].name == "c3"


def test_an_epoch_deals_every_example_once_and_marks_its_end() -> None:
    examples = {"x": torch.arange(5)}
    dealt = list(make_batches(examples, Budget(batch=2, epochs=2), 0, "order", 0, 0))
    assert [len(b["x"]) for b in dealt] == [2, 2, 1, 2, 2, 1]
    for epoch in (dealt[:3], dealt[3:]):
        assert sorted(torch.cat([b["x"] for b in epoch]).tolist()) == [0, 1, 2, 3, 4]
    assert [bool(b["last"]) for b in dealt] == [False, False, True] * 2
    assert [int(b["epoch"]) for b in dealt] == [0, 0, 0, 1, 1, 1]


def test_a_number_of_steps_goes_over_as_many_passes_as_it_needs() -> None:
    examples = {"x": torch.arange(3)}
    budget = Budget(batch=2, epochs=1, steps=5)
    dealt = list(make_batches(examples, budget, 0))
    assert len(dealt) == count_steps(examples, budget) == 5
    assert [bool(b["last"]) for b in dealt] == [False] * 4 + [True]
    assert sorted(torch.cat([dealt[0]["x"], dealt[1]["x"]]).tolist()) == [0, 1, 2]


def test_order_depends_on_the_key_alone() -> None:
    examples = {"x": torch.arange(50)}

    def order(*key: int) -> list[int]:
        return next(make_batches(examples, Budget(50), *key))["x"].tolist()

    assert order(0, 1, 2) == order(0, 1, 2)
    assert order(0, 1, 2) != order(0, 2, 1)


def test_pooled_batches_are_met_in_turn() -> None:
    streams = [iter([{"x": torch.tensor(v)} for v in part]) for part in ([1, 2, 3], [10], [20, 30])]
    assert [int(b["x"]) for b in interleave(streams)] == [1, 10, 20, 2, 30, 3]


def test_a_stack_holds_the_clients_that_still_have_batches_and_fills_with_zeros() -> None:
    long = make_batches({"x": torch.tensor([1.0, 2.0, 3.0])}, Budget(2), 0)
    short = make_batches({"x": torch.tensor([4.0])}, Budget(2), 0)
    first, second = stack([long, short])
    assert first["x"].shape == (2, 2)
    assert first["x"][1].tolist() == [4.0, 0.0]
    assert second["x"].shape == (1, 1)
    assert first["last"].tolist() == [False, True]


def test_head_of_zero_is_everything() -> None:
    examples = {"x": torch.arange(4)}
    assert count_rows(subsample_evenly(examples, 0)) == 4
    assert count_rows(subsample_evenly(examples, 3)) == 3
    assert subsample_evenly(examples, 2)["x"].tolist() == [0, 2]
