from dataclasses import replace

import pytest

from fedgen_edge.algorithms.methods import METHODS, check
from fedgen_edge.cli.compatibility import (
    FEATURES,
    PLANNED,
    find_objection,
    find_settings,
    make_legend,
    make_row,
    make_rows,
)
from fedgen_edge.cli.main import main
from fedgen_edge.errors import ConfigError


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_suit_it(name: str) -> None:
    check(find_settings(name))
    assert find_settings(name).method.name == name


def test_all_that_fedavg_of_adapters_works_with() -> None:
    assert {k for k, why in make_row("fedgen-edge").items() if why} == {"ranks"}


@pytest.mark.parametrize(
    ("name", "feature", "why"),
    [
        ("scaffold", "bits", "[uplink] and [downlink] change it: leave them out"),
        ("flexlora", "down top-k", "say downlink.sparsify='all'"),
        ("fed-sb", "top-k", "say uplink.dtype='int8'"),
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
    told = make_row(name)[feature]
    assert told is not None
    assert why in told
    assert "\n" not in told


def test_a_baselines_objection_names_the_baselines() -> None:
    plain = find_settings("fedgen-edge")
    asked = FEATURES["down top-k"].enable(plain)
    beside = replace(asked, evaluation=replace(asked.evaluation, baselines=("flora",)))
    with pytest.raises(ConfigError, match=r"^evaluation\.baselines='flora' merges what clients"):
        check(beside)
    assert find_objection("fedgen-edge", "down top-k") is None


def test_a_baseline_that_cannot_be_stacked_runs_beside_a_method_that_is() -> None:
    # a run writes its engine into its settings, and is resumed from them
    stacked = FEATURES["stacked"].enable(find_settings("fedgen-edge"))
    check(replace(stacked, evaluation=replace(stacked.evaluation, baselines=("fedavg-full",))))
    assert find_objection("fedavg-full", "stacked") is not None


def test_the_command_prints_a_mark_for_each_pair(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    said = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(said) if line.startswith("works with"))
    printed = {
        line.split()[0]: line.split()[1:] for line in said[head + 1 : head + 1 + len(METHODS)]
    }
    built = {n: ["no" if row[k] else "yes" for k in FEATURES] for n, row in make_rows().items()}
    expected = {n: [*marks, *("-" for _ in PLANNED)] for n, marks in built.items()}
    assert printed == expected
    assert [*make_legend()] == [*FEATURES, *PLANNED] == [*make_row("ditto")]


def test_of_one_method_the_command_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "scaffold"])
    page = capsys.readouterr().out
    assert f"no  bits: {find_objection('scaffold', 'bits')}" in page
    assert all(f"  -   {feature}: " in page for feature in PLANNED)
    with pytest.raises(SystemExit) as ended:
        main(["methods", "scafold"])
    assert ended.value.code == 2
    assert "did you mean 'scaffold'" in capsys.readouterr().err
