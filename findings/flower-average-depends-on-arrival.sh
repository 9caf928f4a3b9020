#!/usr/bin/env bash
# Flower 1.41.0: the average of the same replies depends on the order in which they arrive.
#
# FedAvg adds float32 arrays up one after the other, as they came. So two runs with the same seeds
# differ in their last bits from the first round on, whichever client was quicker, and a run cannot be
# repeated exactly over a network. A sum in a fixed order, or in float64, would not.
#
# Seen (flwr 1.41.0, numpy 2.4.6, five replies of 1,000 normal numbers, 3 to 13 examples):
#   476 of 1000 averages differ when the same replies arrive in reverse
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" flwr==1.41.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords  # FedAvg's

rng = np.random.default_rng(0)
replies = [
    RecordDict({
        "arrays": ArrayRecord([rng.standard_normal(1000).astype(np.float32)]),
        "metrics": MetricRecord({"num-examples": examples}),
    })
    for examples in (3, 5, 7, 11, 13)
]


def average(records):
    return aggregate_arrayrecords(records, "num-examples").to_numpy_ndarrays()[0]


forward, backward = average(replies), average(replies[::-1])
differ = int((forward != backward).sum())
print(f"{differ} of 1000 averages differ when the same replies arrive in reverse")
assert forward.dtype == np.float32
assert np.array_equal(forward, average(replies))
assert differ > 100
PY
