#!/usr/bin/env bash
# ByzFL 0.0.11 and Flower 1.41.0: "Krum" of the same six updates, with one attacker, are two clients.
#
# Krum (Blanchard et al. 2017) scores an update by its n - f - 2 nearest neighbours. Flower does so.
# ByzFL takes n - f nearest, the update itself among them: n - f - 1 neighbours. So tables of
# robustness that name the rule are not of one rule. (ByzFL's package imports torchvision; its
# aggregators are loaded here without it.)
#
# Seen (byzfl 0.0.11, flwr 1.41.0): of 6, 10, 13, 14, 15, 17 with f = 1
#   Flower chooses 15, ByzFL 14; by hand three neighbours choose 15, four choose 14
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" flwr==1.41.0 numpy==2.4.6 scipy==1.17.1
"${pip[@]}" --no-deps byzfl==0.0.11
"$folder/venv/bin/python" - <<'PY'
import sys
import sysconfig
import types

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum  # Flower's Krum, for one

package = types.ModuleType("byzfl")  # without its __init__, which imports torchvision
package.__path__ = [sysconfig.get_path("purelib") + "/byzfl"]
sys.modules["byzfl"] = package
from byzfl.aggregators.aggregators import Krum as ByzFLKrum

values = [6.0, 10.0, 13.0, 14.0, 15.0, 17.0]


def by_hand(neighbours):
    def score(v):
        return sum(sorted((v - w) ** 2 for w in values)[1 : neighbours + 1])

    return min(values, key=score)


replies = [
    RecordDict({
        "arrays": ArrayRecord([np.array([value])]),
        "metrics": MetricRecord({"num-examples": 1}),
    })
    for value in values
]
(chosen,) = select_multikrum(replies, 1, 1)
flower = float(chosen["arrays"].to_numpy_ndarrays()[0][0])
byzfl = float(ByzFLKrum(1)(np.array(values)[:, None])[0])
print(f"Flower {flower:.0f}, ByzFL {byzfl:.0f}; by hand {by_hand(3):.0f} and {by_hand(4):.0f}")
assert flower == by_hand(6 - 1 - 2) == 15
assert byzfl == by_hand(6 - 1 - 1) == 14
PY
