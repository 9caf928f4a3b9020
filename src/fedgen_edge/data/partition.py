"""Divide the examples among clients, then split each client into train, validation and test.

The partitioners return indices, one list per client, and know nothing about text.
"""

import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np

from fedgen_edge import config, seeds
from fedgen_edge.data.corpus import Corpus, Texts
from fedgen_edge.errors import ConfigError, DataError

MAX_DRAWS = 100  # maximum draws of a Dirichlet partition
DEFAULT_CLIENTS = 10  # if neither the settings nor the data give a number


@dataclass(frozen=True)
class ClientSplits:
    """One client's examples: ascending indices into the corpus, each in only one list."""

    name: str
    """Its natural group, or `client-000`."""
    train: list[int]
    validation: list[int]
    test: list[int]


def partition(
    corpus: Corpus,
    data: config.Data,
    settings: config.Partition,
    clients: int | None,
    seed: int,
) -> list[ClientSplits]:
    """Return each client's examples, sorted by its name.

    Args:
        corpus: the examples, with labels from `assign_labels`.
        data: validation and test shares, if the source fixes no split, and their seed.
        settings: the partition.
        clients: number of clients; None means every natural group, or one per entry of `sizes`,
            or else 10.
        seed: seed of the whole run.

    Raises:
        ConfigError: the settings cannot be carried out on these data.
        DataError: a client would be left with too little, or an empty split.
    """
    by_client = divide(corpus, settings, clients, seed)
    for name, examples in sorted(by_client.items()):
        if len(examples) < settings.minimum:
            num_large_enough = sum(len(other) >= settings.minimum for other in by_client.values())
            largest = (
                f"take the {num_large_enough} largest with federation.clients={num_large_enough}"
            )
            raise DataError(
                f"client {name!r} has {len(examples)} examples, fewer than "
                f"partition.minimum={settings.minimum}: lower that, or "
                + (largest if settings.by == "group" and num_large_enough else "have fewer clients")
            )
    return [split_client(name, by_client[name], corpus, data) for name in sorted(by_client)]


def divide(
    corpus: Corpus, settings: config.Partition, clients: int | None, seed: int
) -> dict[str, list[int]]:
    """Return the examples of each client by name, before they are split."""
    if settings.by == "group":
        return divide_by_group(corpus.groups, clients)
    _check_enough(corpus, settings, clients or 1)  # before allocating anything for so many
    sizes = _get_sizes(settings, clients)
    _check_enough(corpus, settings, len(sizes))
    rng = np.random.default_rng(seeds.seed(seed, "partition"))
    order = rng.permutation(len(corpus.examples)).tolist()
    if settings.by == "dirichlet":
        labels = corpus.labels
        if labels is None:
            raise ConfigError(
                "partition.labels='label', but the data have no labels: set "
                "partition.labels='topic', or name the field with data.label_field"
            )
        order = stratify(order, list(zip(labels, corpus.splits or labels, strict=True)))
        shuffled = [labels[i] for i in order]
        parts = dirichlet(shuffled, len(sizes), settings.alpha, settings.minimum, rng)
    else:
        order = stratify(order, corpus.splits or [""] * len(order))
        parts = divide_by_size(len(order), sizes)
    width = max(3, len(str(len(parts) - 1)))
    return {f"client-{c:0{width}d}": [order[i] for i in part] for c, part in enumerate(parts)}


def _check_enough(corpus: Corpus, settings: config.Partition, clients: int) -> None:
    if len(corpus.examples) < clients * settings.minimum:
        raise ConfigError(
            f"partition.minimum={settings.minimum} for federation.clients={clients} needs "
            f"{clients * settings.minimum} examples, and there are {len(corpus.examples)}: "
            "lower one of them, or bring more data"
        )


def _get_sizes(settings: config.Partition, clients: int | None) -> Sequence[float]:
    """Return the clients' relative sizes; a Dirichlet partition uses only their number."""
    if settings.by == "pooled" and clients not in {None, 1}:
        raise ConfigError(
            f"federation.clients={clients} with partition.by='pooled', where one client has "
            "all: leave federation.clients out"
        )
    if settings.by == "pooled":
        return [1.0]
    if settings.by == "size" and settings.sizes:
        if clients not in {None, len(settings.sizes)}:
            raise ConfigError(
                f"partition.sizes={settings.sizes} are {len(settings.sizes)} clients, and "
                f"federation.clients={clients}: make them agree"
            )
        return settings.sizes
    count = clients or DEFAULT_CLIENTS
    return [float(n) if settings.by == "size" else 1.0 for n in range(1, count + 1)]


def assign_labels(corpus: Corpus, settings: config.Partition, seed: int) -> Corpus:
    """Return the corpus, with topics as its labels if the settings ask for them."""
    if settings.labels == "label":
        return corpus
    if not isinstance(corpus.examples, Texts):
        raise ConfigError(
            "partition.labels='topic' is found in text, and these are images: say 'label'"
        )
    topic_labels = find_topics(corpus.examples.texts, settings.topics, seed, corpus.splits)
    return replace(corpus, labels=topic_labels)


def divide_by_group(groups: Sequence[str] | None, clients: int | None) -> dict[str, list[int]]:
    """Return the natural clients: all, or the largest `clients`; ties go by name."""
    if groups is None:
        raise ConfigError(
            "partition.by='group', but the data have no natural clients: set partition.by='iid', "
            "or name the field with data.client_field"
        )
    sizes = Counter(groups)
    if clients is not None and clients > len(sizes):
        raise ConfigError(
            f"federation.clients={clients}, but the data have {len(sizes)} natural clients: "
            "lower it, or set partition.by='iid'"
        )
    chosen = sorted(sizes, key=lambda name: (-sizes[name], name))[:clients]
    by_client: dict[str, list[int]] = {name: [] for name in chosen}
    for index, name in enumerate(groups):
        if name in by_client:
            by_client[name].append(index)
    return by_client


def divide_by_size(count: int, sizes: Sequence[int | float]) -> list[list[int]]:
    """Return consecutive runs proportional to the sizes, rounded so that nothing is left over."""
    ends = [0, *(np.cumsum(sizes) * count / np.sum(sizes)).astype(int)[:-1].tolist(), count]
    return [list(range(*bounds)) for bounds in pairwise(ends)]


def dirichlet(
    labels: Sequence[str], clients: int, alpha: float, minimum: int, rng: np.random.Generator
) -> list[list[int]]:
    """Divide each label's examples in proportions drawn from Dirichlet(alpha) over the clients.

    The draw is repeated until every client has the minimum.

    Raises:
        ConfigError: no draw gave every client its minimum.

    Source: Hsu et al. 2019 (arXiv:1909.06335), drawn by label as in Li et al. 2022
    (arXiv:2102.02079) and flwr-datasets' DirichletPartitioner, without its optional balancing.
    """
    members = [np.flatnonzero(np.array(labels) == label) for label in sorted(set(labels))]
    for _ in range(MAX_DRAWS):
        shares = [rng.dirichlet(np.full(clients, alpha)) for _ in members]
        cuts = [
            (np.cumsum(share) * len(own)).astype(int)[:-1]
            for share, own in zip(shares, members, strict=True)
        ]
        pieces = [np.split(own, cut) for own, cut in zip(members, cuts, strict=True)]
        parts = [np.concatenate(part).tolist() for part in zip(*pieces, strict=True)]
        if min(map(len, parts)) >= minimum:
            return parts
    raise ConfigError(
        f"partition.alpha={alpha} gave not every one of federation.clients={clients} its "
        f"partition.minimum={minimum} examples in {MAX_DRAWS} draws: raise alpha, lower "
        "the minimum "
        "or the clients, or bring more data"
    )


def find_topics(
    texts: Sequence[str], count: int, seed: int, splits: Sequence[str] | None = None
) -> list[str]:
    """Return a topic for each text, named by its number and its three heaviest words.

    TF-IDF and k-means, fit only on training texts if there are splits. It runs on one thread: sums
    over several threads vary in order, and a partition must be reproducible.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    training_texts = [t for i, t in enumerate(texts) if splits is None or splits[i] == "train"]
    vectorizer = TfidfVectorizer(
        stop_words="english", sublinear_tf=True, max_df=0.8, max_features=10_000
    )
    # n_init may be a number; scikit-learn's annotation is inferred from its default, "auto".
    kmeans = KMeans(count, n_init=cast(Any, 4), random_state=seeds.seed(seed, "topics") % 2**32)
    try:
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            kmeans.fit(vectorizer.fit_transform(training_texts))
            topic_numbers = kmeans.predict(vectorizer.transform(texts))
    except (ValueError, ConvergenceWarning):
        raise ConfigError(
            f"partition.topics={count} are not to be found in {len(training_texts)} "
            "training texts: "
            "lower it, or bring more data"
        ) from None
    words = vectorizer.get_feature_names_out()
    top_words = words[np.argsort(-kmeans.cluster_centers_)[:, :3]]
    names = [f"{number}: {', '.join(head)}" for number, head in enumerate(top_words)]
    return [names[topic] for topic in topic_numbers]


def stratify(order: Sequence[int], strata: Sequence[Hashable]) -> list[int]:
    """Reorder so that any run holds each stratum in about its share of the whole."""
    sizes, seen_counts = Counter(strata), Counter()
    place: dict[int, float] = {}
    for index in order:
        seen_counts[strata[index]] += 1
        place[index] = (seen_counts[strata[index]] - 0.5) / sizes[strata[index]]
    return sorted(order, key=place.__getitem__)


def split_client(name: str, examples: list[int], corpus: Corpus, data: config.Data) -> ClientSplits:
    """Split a client's examples as the source does; other splits are cut from training.

    A share above 0 gives at least one example. The cut does not depend on the run's seed:
    otherwise one seed would train, and be tuned, on another seed's test examples.
    """
    rng = np.random.default_rng(seeds.seed(data.split_seed, "held out", name))
    by_split: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index in examples:
        by_split[corpus.splits[index] if corpus.splits else "train"].append(index)
    shares = {"validation": data.validation, "test": data.test}
    remaining, count = rng.permutation(by_split["train"]).tolist(), len(by_split["train"])
    for split, share in shares.items():
        if share and split not in corpus.fixed_splits:
            cut = max(1, round(share * count))
            by_split[split], remaining = remaining[:cut], remaining[cut:]
    by_split["train"] = remaining[: data.train_limit]
    for split, share in {"train": 1.0, **shares}.items():
        if share and not by_split[split]:
            raise DataError(
                f"client {name!r} has no {split} example among its {len(examples)}: raise "
                "partition.minimum, partition.alpha or its share in data, or have fewer clients"
            )
    return ClientSplits(
        name, *(sorted(by_split[split]) for split in ("train", "validation", "test"))
    )
