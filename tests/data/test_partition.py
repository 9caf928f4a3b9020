"""Who holds what: nothing lost or doubled, known answers, and flwr-datasets' distribution."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from fedgen_edge import config
from fedgen_edge.data.corpus import Corpus, Texts
from fedgen_edge.data.partition import (
    ClientSplits,
    assign_labels,
    dirichlet,
    divide_by_group,
    divide_by_size,
    find_topics,
    partition,
    stratify,
)
from fedgen_edge.errors import ConfigError, DataError

COLUMNS = ("groups", "labels", "splits")
SPORT = ["goal", "match", "team", "player", "score", "league", "coach", "stadium"]
FOOD = ["butter", "oven", "flour", "sugar", "recipe", "onion", "garlic", "sauce"]


def corpus_of(count: int, **columns: Sequence[str]) -> Corpus:
    given = [list(columns[name]) if name in columns else None for name in COLUMNS]
    return Corpus(Texts([f"text {i}" for i in range(count)], [3] * count), *given, duplicates=0)


def two_topics(count: int) -> tuple[list[str], list[str]]:
    """Texts of four words, of sport and of food in turn, and which it is."""
    rng = np.random.default_rng(0)
    kinds = ["sport", "food"] * (count // 2)
    words = {"sport": SPORT, "food": FOOD}
    return [" ".join(rng.choice(words[kind], 4, replace=False)) for kind in kinds], kinds


def all_of(holdings: list[ClientSplits]) -> list[int]:
    return [i for own in holdings for i in own.train + own.validation + own.test]


def sizes_of(holdings: list[ClientSplits]) -> list[int]:
    return [len(all_of([own])) for own in holdings]


def chance(one: np.ndarray, other: np.ndarray) -> float:
    """That two samples of one distribution differ at least so, by Kolmogorov and Smirnov."""
    result: Any = ks_2samp(one, other)
    return result.pvalue


@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data(), by=st.sampled_from(["group", "iid", "dirichlet", "size", "pooled"]))
def test_no_example_is_lost_or_doubled(data: st.DataObject, by: Any) -> None:
    count = data.draw(st.integers(60, 90))
    column = st.sampled_from("abc")
    groups, labels = (data.draw(st.lists(column, min_size=count, max_size=count)) for _ in "gl")
    groups[:9], labels[:9] = "aaabbbccc", "aaabbbccc"
    splits = data.draw(st.sampled_from([{}, {"splits": ["train", "test", "validation"] * 30}]))
    clients = data.draw(st.integers(1, 4)) if by in {"iid", "dirichlet", "size"} else None
    splits = {name: column[:count] for name, column in splits.items()}
    corpus = corpus_of(count, groups=groups, labels=labels, **splits)
    settings = config.Partition(by=by, alpha=10.0)
    seed = data.draw(st.integers(0, 99))
    held = partition(corpus, config.Data(), settings, clients, seed)
    assert sorted(all_of(held)) == list(range(count))
    assert held == partition(corpus, config.Data(), settings, clients, seed)
    assert len(held) == (clients or len({"pooled": "a"}.get(by, "abc")))
    fixed = dict(enumerate(corpus.splits or []))
    assert {fixed.get(i, "train") for own in held for i in own.train} == {"train"}
    assert {fixed.get(i, "test") for own in held for i in own.test} == {"test"}


def test_names_sort_as_numbers_and_another_seed_divides_otherwise() -> None:
    settings = config.Partition(by="iid")
    first, second = (partition(corpus_of(4000), config.Data(), settings, 1001, s) for s in (0, 1))
    assert [first[0].name, first[-1].name] == ["client-0000", "client-1000"]
    assert first != second


def test_sizes_are_kept_in_proportion() -> None:
    # Of 10 examples, 1/5, 1/5 and 3/5 are 2, 2 and 6; thirds end at 3.3 and 6.7.
    assert divide_by_size(10, (1, 1, 3)) == [[0, 1], [2, 3], [4, 5, 6, 7, 8, 9]]
    assert [len(part) for part in divide_by_size(10, (1, 1, 1))] == [3, 3, 4]
    # None given: 1, 2, 3 of 6 parts of 60 examples.
    held = partition(corpus_of(60), config.Data(), config.Partition(by="size"), 3, 0)
    assert sizes_of(held) == [10, 20, 30]
    settings = config.Partition(by="size", sizes=(2.0, 1.0))
    held = partition(corpus_of(60), config.Data(), settings, None, 0)
    assert sizes_of(held) == [40, 20]


def test_largest_groups_are_taken_and_of_equal_ones_the_first_by_name() -> None:
    # c has 4, a and b have 3 each, d has 2.
    groups = list("dbcacabcdabc")
    assert divide_by_group(groups, 2) == {"c": [2, 4, 7, 11], "a": [3, 5, 9]}
    assert {name: len(own) for name, own in divide_by_group(groups, None).items()} == Counter(
        groups
    )


def test_order_is_spread_so_that_every_run_holds_each_stratum_in_its_share() -> None:
    # Four a at 1/8, 3/8, 5/8, 7/8 of the whole and two b at 1/4, 3/4.
    assert stratify([0, 1, 2, 3, 4, 5], "aaaabb") == [0, 4, 1, 2, 5, 3]


def test_shares_are_rounded_and_at_least_one_example() -> None:
    # 0.2 and 0.1 of 23 are 4.6 and 2.3; of 3, both are at least 1.
    shares = config.Data(validation=0.2, test=0.1)
    own = partition(corpus_of(23), shares, config.Partition(by="pooled"), None, 0)[0]
    assert [len(part) for part in (own.train, own.validation, own.test)] == [16, 5, 2]
    own = partition(corpus_of(3), shares, config.Partition(by="pooled"), None, 0)[0]
    assert [len(part) for part in (own.train, own.validation, own.test)] == [1, 1, 1]
    none = config.Data(validation=0.0, test=0.0)
    own = partition(corpus_of(3), none, config.Partition(by="pooled"), None, 0)[0]
    assert own == ClientSplits("client-000", train=[0, 1, 2], validation=[], test=[])


def test_split_of_the_source_is_kept_and_what_it_lacks_is_cut_from_training() -> None:
    # 20 training and 10 test examples: 0.1 of 20 is 2 for validation.
    corpus = corpus_of(30, splits=["train"] * 20 + ["test"] * 10)
    own = partition(corpus, config.Data(), config.Partition(by="pooled"), None, 0)[0]
    assert own.test == list(range(20, 30))
    assert (len(own.train), len(own.validation)) == (18, 2)
    assert sorted(own.train + own.validation) == list(range(20))


def test_split_of_a_natural_client_does_not_depend_on_the_others() -> None:
    few = corpus_of(12, groups="a" * 12)
    more = corpus_of(20, groups="a" * 12 + "b" * 8)
    one, both = (partition(c, config.Data(), config.Partition(), None, 0) for c in (few, more))
    assert one[0] == both[0]


@pytest.mark.parametrize("by", ["iid", "dirichlet"])
def test_every_client_gets_its_share_of_each_split(by: Any) -> None:
    # 4 equal clients: each gets 50 of 200 test examples, and the label's quarter of them, 25,
    # where the label is divided; a cut at either end is off by at most one.
    corpus = corpus_of(400, labels="ab" * 200, splits=["train"] * 200 + ["test"] * 200)
    settings = config.Partition(by=by, alpha=1e8)
    for own in partition(corpus, config.Data(validation=0.0), settings, 4, 0):
        assert 48 <= len(own.test) <= 52
        assert by == "iid" or all(23 <= sum(i % 2 == odd for i in own.test) <= 27 for odd in (0, 1))


def flower(
    labels: list[str], clients: int, alpha: float, minimum: int, seed: int
) -> list[list[int]]:
    """The same by flwr-datasets."""
    reason = "needs flwr-datasets, to compare with"
    flwr = pytest.importorskip("flwr_datasets.partitioner", reason=reason)
    datasets = pytest.importorskip("datasets", reason=reason)
    theirs = flwr.DirichletPartitioner(
        clients, "label", alpha, min_partition_size=minimum, shuffle=False, seed=seed
    )
    theirs.dataset = datasets.Dataset.from_dict({"label": labels, "i": list(range(len(labels)))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each draw that it repeats
        return [list(theirs.load_partition(client)["i"]) for client in range(clients)]


@pytest.mark.parametrize(("alpha", "minimum"), [(0.3, 0), (0.5, 4), (1.0, 8), (100.0, 20)])
def test_dirichlet_is_flowers_to_the_example_when_their_generators_agree(
    alpha: float, minimum: int
) -> None:
    labels = np.random.default_rng(5).choice(list("abcde"), 200).tolist()
    for seed in range(10):
        ours = dirichlet(labels, 6, alpha, minimum, np.random.default_rng(seed))
        assert ours == flower(labels, 6, alpha, minimum, seed)


def test_whole_partition_has_the_distribution_of_flowers() -> None:
    # Over 150 seeds each: the largest client, and the mean share of a client's main label.
    labels = list("abcde") * 60
    corpus, data = corpus_of(300, labels=labels), config.Data(validation=0.0, test=0.0)

    def of(parts: list[list[int]]) -> tuple[float, float]:
        main = [max(Counter(labels[i] for i in part).values()) / len(part) for part in parts]
        return max(map(len, parts)), float(np.mean(main))

    def ours(alpha: float, seed: int) -> tuple[float, float]:
        settings = config.Partition(by="dirichlet", alpha=alpha, minimum=5)
        return of([own.train for own in partition(corpus, data, settings, 6, seed)])

    theirs = np.array([of(flower(labels, 6, 0.5, 5, 1000 + seed)) for seed in range(150)])
    same = np.array([ours(0.5, seed) for seed in range(150)])
    other = np.array([ours(1.0, seed) for seed in range(150)])
    for column in range(2):
        alike, unlike = (chance(own[:, column], theirs[:, column]) for own in (same, other))
        assert alike > 0.05
        assert unlike < 1e-4


def test_large_alpha_gives_every_client_an_equal_part_of_every_label() -> None:
    # Each of 4 clients gets 1/4 of 100 a and of 100 b, and a cut is off by at most one.
    labels = ["a"] * 100 + ["b"] * 100
    for part in dirichlet(labels, 4, 1e6, 0, np.random.default_rng(0)):
        counts = Counter(labels[i] for i in part)
        assert all(24 <= counts[label] <= 26 for label in "ab")


def test_alpha_too_small_for_every_client_is_refused() -> None:
    corpus = corpus_of(100, labels=["a"] * 100)
    settings = config.Partition(by="dirichlet", alpha=1e-3)
    with pytest.raises(
        ConfigError, match=r"^partition.alpha=0.001 .*federation.clients=10 .*raise"
    ):
        partition(corpus, config.Data(), settings, 10, 0)


def test_topics_of_two_vocabularies_are_found() -> None:
    texts, kinds = two_topics(60)
    found = find_topics(texts, 2, seed=0)
    assert len(set(zip(found, kinds, strict=True))) == 2
    assert found == find_topics(texts, 2, seed=0)
    for name, kind in zip(found, kinds, strict=True):
        assert set(name.split(": ")[1].split(", ")) <= set(SPORT if kind == "sport" else FOOD)


def test_topics_are_fitted_on_training_text_only() -> None:
    # Fitted on all, half of the texts would make a topic of zebras.
    texts, _ = two_topics(60)
    found = find_topics(texts + ["zebra lion"] * 60, 2, 0, ["train"] * 60 + ["test"] * 60)
    assert found[:60] == find_topics(texts, 2, 0)


def test_what_is_held_out_of_natural_clients_does_not_go_by_the_runs_seed() -> None:
    corpus = corpus_of(90, groups=list("abc") * 30)
    one, other = (partition(corpus, config.Data(), config.Partition(), None, s) for s in (0, 1))
    assert one == other
    again = partition(corpus, config.Data(split_seed=1), config.Partition(), None, 0)
    assert [own.test for own in again] != [own.test for own in one]


def test_fewer_training_examples_leave_what_is_held_out_as_it_is() -> None:
    told = config.Partition(by="iid", minimum=1)

    def held(limit: int | None) -> list[ClientSplits]:
        data = config.Data(validation=0.1, test=0.2, train_limit=limit)
        return partition(corpus_of(40), data, told, 2, seed=0)

    # of 20 examples 2 and 4 are held out
    few, more, whole = held(3), held(8), held(None)
    counts = [{len(own.train) for own in each} for each in (few, more, whole)]
    assert counts == [{3}, {8}, {14}]
    for one, two, three in zip(few, more, whole, strict=True):
        assert {*one.train} < {*two.train} < {*three.train}
        assert (one.validation, one.test) == (three.validation, three.test)


def test_dirichlet_skews_topics_where_the_settings_say_so() -> None:
    # Shares are all but 0 and 1; of such draws, only a topic for each gives each client 29.
    texts, kinds = two_topics(60)
    corpus = Corpus(Texts(texts, [5] * 60), None, None, None, 0)
    settings = config.Partition(by="dirichlet", labels="topic", topics=2, alpha=0.01, minimum=29)
    held = partition(assign_labels(corpus, settings, 0), config.Data(), settings, 2, 0)
    main = [Counter(kinds[i] for i in all_of([own])).most_common(1)[0] for own in held]
    assert {kind for kind, _ in main} == {"sport", "food"}
    assert min(count for _, count in main) >= 29


def test_labels_are_the_datas_own_or_topics() -> None:
    texts, kinds = two_topics(60)
    corpus = Corpus(Texts(texts, [5] * 60), None, kinds, None, 0)
    assert assign_labels(corpus, config.Partition(), 0).labels == kinds
    by_topic = config.Partition(labels="topic", topics=2)
    assert assign_labels(corpus, by_topic, 0).labels == find_topics(texts, 2, 0)


@pytest.mark.parametrize("texts", [["a b"] * 3, ["goal match"] * 20, ["the of and"] * 20])
def test_more_topics_than_texts_show_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^partition.topics=4 are not to be found in"):
        find_topics(texts, 4, 0)


@pytest.mark.parametrize(
    ("by", "clients", "expected"),
    [
        ("group", None, r"partition.by='group', but the data have no natural clients: set"),
        ("dirichlet", 2, r"partition.labels='label', .* set partition.labels='topic'"),
        ("iid", 5, r"partition.minimum=3 for federation.clients=5 needs 15 examples, .* are 12"),
        (
            "size",
            10**15,
            r"partition.minimum=3 for federation.clients=10{15} needs 30{15} examples",
        ),
        ("pooled", 2, r"federation.clients=2 with partition.by='pooled', .*leave"),
        ("size", 4, r"partition.sizes=\(1.0, 2.0\) are 2 clients, and federation.clients=4"),
    ],
)
def test_setting_that_the_data_cannot_carry_is_refused(
    by: Any, clients: int | None, expected: str
) -> None:
    settings = config.Partition(by=by, sizes=(1.0, 2.0))
    with pytest.raises(ConfigError, match=f"^{expected}[^\n]*$"):
        partition(corpus_of(12), config.Data(), settings, clients, 0)


def test_too_many_or_too_small_natural_clients_are_refused_with_the_way_out() -> None:
    corpus = corpus_of(10, groups="aaaabbbbcc")
    expected = r"^client 'c' has 2 examples, .*partition.minimum=3: .* federation.clients=2$"
    with pytest.raises(DataError, match=expected):
        partition(corpus, config.Data(), config.Partition(), None, 0)
    assert len(partition(corpus, config.Data(), config.Partition(), 2, 0)) == 2
    with pytest.raises(ConfigError, match=r"^federation.clients=4, .* 3 natural clients: lower"):
        partition(corpus, config.Data(), config.Partition(), 4, 0)
    settings = config.Partition(by="size", sizes=(1.0, 9.0))
    with pytest.raises(DataError, match=r"^client 'client-000' has 1 examples, .* fewer clients$"):
        partition(corpus, config.Data(), settings, None, 0)


def test_client_without_training_or_test_text_is_named() -> None:
    one = config.Partition(minimum=1)
    with pytest.raises(DataError, match=r"^client 'a' has no train example among its 2: raise"):
        partition(corpus_of(2, groups="aa"), config.Data(), one, None, 0)
    splits = ["train", "train", "test", "train", "train", "train"]
    corpus = corpus_of(6, groups="aaabbb", splits=splits)
    with pytest.raises(DataError, match=r"^client 'b' has no test example among its 3: raise"):
        partition(corpus, config.Data(), config.Partition(), None, 0)
    held = partition(corpus, config.Data(test=0.0), config.Partition(), None, 0)
    assert [own.test for own in held] == [[2], []]
