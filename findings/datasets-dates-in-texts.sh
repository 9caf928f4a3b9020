#!/usr/bin/env bash
# datasets 4.8.5: texts of a JSON file that look like dates come back as dates.
#
# load_dataset("json") lets the reader guess: a column of which every text looks like a date or a time
# becomes datetime, and what is trained on is no longer what the file says. With one other text among them the column
# stays text. In a column of numbers and texts each value becomes its own JSON: "x" gets quotes.
#
# Seen (datasets 4.8.5, pyarrow 26.0.1):
#   ["2020-01-01", "2020-01-02 10:00:00"] -> datetime, datetime; [1, "x"] -> "1", "\"x\""
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
cd "$folder"
"${pip[@]}" datasets==4.8.5 pyarrow==26.0.1
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"
"$folder/venv/bin/python" -W ignore - <<'PY'
import json
from datetime import datetime

from datasets import load_dataset


def read(values):
    with open("rows.json", "w") as file:
        json.dump([{"text": value} for value in values], file)
    rows = load_dataset("json", data_files="rows.json", split="train", streaming=True)
    return [row["text"] for row in rows]


dates = read(["2020-01-01", "2020-01-02 10:00:00"])
mixed = read(["2020-01-01", "no date"])
numbers = read([1, "x"])
print([type(value).__name__ for value in dates], mixed, numbers)
assert all(isinstance(value, datetime) for value in dates)
assert mixed == ["2020-01-01", "no date"]
assert numbers == ["1", '"x"']
PY
