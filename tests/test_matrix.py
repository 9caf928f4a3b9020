from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_edge.algorithms.methods import METHODS, check
from fedgen_edge.cli import main
from fedgen_edge.config import Method
from fedgen_edge.errors import ConfigError
from fedgen_edge.matrix import FEATURES, TO_COME, legend, objection, row, rows, suited
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves, Order, Update


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_suit_it(name: str) -> None:
    check(suited(name))
    assert suited(name).method.name == name


def test_all_that_fedavg_of_adapters_works_with() -> None:
    assert {k for k, why in row("fedgen-edge").items() if why} == {"ranks"}


@pytest.mark.parametrize(
    ("name", "feature", "why"),
    [
        ("scaffold", "bits", "[uplink] and [downlink] change it: leave them out"),
        ("flexlora", "down top-k", "say downlink.keep='all'"),
        ("fed-sb", "top-k", "say uplink.values='int8'"),
        ("fed-sb", "down", "[downlink] changes them: leave it out"),
        ("fedavg-full", "stacked", "say serial, or auto"),
        ("fedgen-edge", "ranks", "take one of flexlora, hetlora"),
        ("local-only", "sites", "use `fedgen run`, or another method"),
        ("fedbuff", "sites", "use `fedgen run`, or another method"),
        ("fedavg-full", "4-bit", "trains the backbone's own weights"),
        ("layerwise", "secure sums", "each client's update by itself"),
    ],
)
def test_a_refused_pair_says_why_and_what_would_work(name: str, feature: str, why: str) -> None:
    told = row(name)[feature]
    assert told is not None
    assert why in told
    assert "\n" not in told


def test_a_baselines_objection_names_the_baselines() -> None:
    plain = suited("fedgen-edge")
    asked = FEATURES["down top-k"].asked(plain)
    beside = replace(asked, evaluation=replace(asked.evaluation, baselines=("flora",)))
    with pytest.raises(ConfigError, match=r"^evaluation\.baselines='flora' merges what clients"):
        check(beside)
    assert objection("fedgen-edge", "down top-k") is None


def test_a_baseline_that_cannot_be_stacked_runs_beside_a_method_that_is() -> None:
    # a run writes its engine into its settings, and is resumed from them
    stacked = FEATURES["stacked"].asked(suited("fedgen-edge"))
    check(replace(stacked, evaluation=replace(stacked.evaluation, baselines=("fedavg-full",))))
    assert objection("fedavg-full", "stacked") is not None


def test_the_command_prints_a_mark_for_each_pair(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    said = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(said) if line.startswith("works with"))
    printed = {
        line.split()[0]: line.split()[1:] for line in said[head + 1 : head + 1 + len(METHODS)]
    }
    expected = {n: ["-" if why else "x" for why in found.values()] for n, found in rows().items()}
    assert printed == expected
    assert [*legend()] == [*FEATURES, *TO_COME] == [*row("ditto")]


def test_of_one_method_the_command_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "scaffold"])
    assert f"no  bits: {objection('scaffold', 'bits')}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["methods", "scafold"])
    assert ended.value.code == 2
    assert "did you mean 'scaffold'" in capsys.readouterr().err


PAIRWISE = ("flexlora", "raflora", "hetlora", "lora-fair", "fedex-lora", "flora", "layerwise")


def cohort(deltas: list[Leaves], weights: list[float]) -> list[Update]:
    start = {k: torch.zeros_like(v) for k, v in deltas[0].items()}
    return [
        Update(Order((i,), 0, start), delta, {}, weight, 0.0, 3, 0)
        for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True))
    ]


def merged(name: str, updates: list[Update]) -> Leaves:
    """The change of an adapter that stands at zero, with a residual where the method has one."""
    algorithm = METHODS[name].make(Method(residual_rank=2))
    state = algorithm.init(updates[0].order.received)
    whole = [replace(u, order=replace(u.order, received=state.adapter)) for u in updates]
    return algorithm.merges(state.adapter, whole)


def drawn(seed: int) -> Leaves:
    rng = generator("sums", seed)
    return {
        "l.lora_A": torch.randn(2, 5, generator=rng),
        "l.lora_B": torch.randn(4, 2, generator=rng),
    }


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].sums and n != "fed-sb"])
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9))
@settings(max_examples=10, deadline=None)
def test_where_sums_suffice_cohorts_of_equal_sums_merge_alike(
    name: str, seed: int, share: float
) -> None:
    one, two = drawn(seed), drawn(seed + 1)
    both = cohort([one, two], [1.0, 1.0])
    # a part of one's change moved to the other: the sum is what it was
    moved = {k: v * share for k, v in one.items()}
    other = cohort(
        [{k: v - moved[k] for k, v in one.items()}, {k: v + moved[k] for k, v in two.items()}],
        [1.0, 1.0],
    )
    for leaf, value in merged(name, both).items():
        torch.testing.assert_close(merged(name, other)[leaf], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAIRWISE)
def test_where_they_do_not_there_are_cohorts_that_show_it(name: str) -> None:
    assert not METHODS[name].sums
    one, two = drawn(0), drawn(1)
    both = merged(name, cohort([one, two], [1.0, 1.0]))
    half = {k: one[k] * 0.5 for k in one}
    other = merged(name, cohort([half, {k: v + half[k] for k, v in two.items()}], [1.0, 1.0]))
    assert any(not torch.allclose(both[k], other[k], atol=1e-3) for k in both)
