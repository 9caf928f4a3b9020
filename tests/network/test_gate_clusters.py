"""The gate, where a site sends back one of several adapters: that one whole, and no other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gate_shortened import line

from fedgen_edge.algorithms.ifca import add_cluster_prefix
from fedgen_edge.compression.serialize import encode
from fedgen_edge.compression.wire import encode_update
from fedgen_edge.errors import RefusedError
from fedgen_edge.leaves import scale, shapes
from fedgen_edge.network.gate import OpenRound, validate_update
from fedgen_edge.network.messages import Reply
from fedgen_edge.types import Leaves, Phase
from support.attacks import DELTA, OPEN, SAID, SCHEMA, START, reply

BOTH = {**add_cluster_prefix(START, 0), **add_cluster_prefix(START, 1)}
# the phases name leaves as they are trained
PHASES = tuple(Phase(name) for name in SCHEMA)
TWO = replace(
    OPEN,
    schema=shapes(BOTH),
    start=BOTH,
    clusters=2,
    bounds=replace(OPEN.bounds, phases=PHASES, spectrum=1e3),
)
ONE = add_cluster_prefix(DELTA, 1)
MIXED = {k.replace("0.bias", "1.bias"): v for k, v in add_cluster_prefix(DELTA, 0).items()}


def sent(leaves: Leaves, cluster: Any = 1) -> Reply:
    return reply(encode(leaves), {**SAID, "cluster": cluster})


def boosted(name: str) -> Leaves:
    return {**ONE, f"cluster.1.{name}": ONE[f"cluster.1.{name}"] * 100}


ATTACKS: dict[str, tuple[str, Reply]] = {
    "both clusters": (
        "payload-too-long",
        sent({**add_cluster_prefix(scale(DELTA, 1.0), 0), **ONE}),
    ),
    "another than it says": ("extra-leaf", sent(ONE, 0)),
    "a leaf of the other": ("extra-leaf", sent(MIXED, 0)),
    "a leaf too few": ("missing-leaf", sent({k: v for k, v in ONE.items() if "bias" not in k})),
    "names of training": ("extra-leaf", sent(DELTA)),
    "a cluster beyond": ("bad-cluster", sent(ONE, 2)),
    "a cluster below": ("bad-cluster", sent(ONE, -1)),
    "a flag": ("bad-cluster", sent(ONE, True)),
    "no whole number": ("bad-cluster", sent(ONE, 1.0)),
    "a text": ("bad-cluster", sent(ONE, "1")),
    "none": ("bad-cluster", sent(ONE, None)),
    "says no cluster": ("bad-numbers", reply(encode(ONE))),
    **{f"boosted {name}": ("change-too-large", sent(boosted(name))) for name in SCHEMA},
}


@pytest.mark.parametrize(("code", "answer"), ATTACKS.values(), ids=ATTACKS)
def test_what_is_not_one_whole_cluster_is_refused_with_its_code(code: str, answer: Reply) -> None:
    with pytest.raises(RefusedError) as refusal:
        validate_update(TWO, answer)
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("cluster", [0, 1])
def test_either_cluster_is_accepted_under_its_own_names(cluster: int) -> None:
    found = validate_update(TWO, sent(add_cluster_prefix(DELTA, cluster), cluster)).leaves
    assert len(found) == len(DELTA)
    assert all(torch.equal(found[f"cluster.{cluster}.{k}"], v) for k, v in DELTA.items())


def test_the_payload_of_a_longer_name_may_be_longer() -> None:
    many = {k: v for c in range(101) for k, v in add_cluster_prefix(START, c).items()}
    many_more = replace(TWO, schema=shapes(many), start=many, clusters=101)
    longer, shorter = (sent(add_cluster_prefix(DELTA, c), c) for c in (100, 1))
    assert len(longer.payload) > len(shorter.payload)
    for answer in (longer, shorter):
        assert validate_update(many_more, answer).weight == 9


def test_a_spectrum_is_of_the_cluster_that_was_trained() -> None:
    far = {**BOTH, **add_cluster_prefix(scale(START, 1e3), 1)}
    limited = replace(TWO, start=far, bounds=replace(TWO.bounds, spectrum=0.5))
    assert validate_update(limited, sent(add_cluster_prefix(DELTA, 0), 0)).weight == 9
    with pytest.raises(RefusedError, match=r"^spectrum-too-large: "):
        validate_update(limited, sent(ONE, 1))


def test_through_a_chain_leaves_have_no_names_and_the_site_says_whose_they_are() -> None:
    on = line()
    open_: OpenRound = replace(TWO, wire=on, site_numbers={"site": 2})
    payload = encode_update(on, ONE, {}, 7, 2)[0]
    for cluster in (0, 1):
        found = validate_update(open_, reply(payload, {**SAID, "cluster": cluster})).leaves
        assert found.keys() == {f"cluster.{cluster}.{k}" for k in SCHEMA}
