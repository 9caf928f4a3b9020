#!/usr/bin/env bash
# datasets 4.8.5: load_dataset() of what save_to_disk() wrote gives the folder's own notes as data.
#
# A DatasetDict of 2 texts, saved, is read by load_dataset(FOLDER) as one row with the columns of
# state.json (_data_files, _fingerprint, ...), without a word. load_from_disk() reads the texts.
#
# Seen (datasets 4.8.5, pyarrow 26.0.1): 1 row with _fingerprint, no text; load_from_disk 2 rows
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
cd "$folder"
"${pip[@]}" datasets==4.8.5 pyarrow==26.0.1
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"
"$folder/venv/bin/python" -W ignore - <<'PY'
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"]})}).save_to_disk("saved")
wrong, right = load_dataset("saved")["train"], load_from_disk("saved")["train"]
print(len(wrong), wrong.column_names, "but", len(right), right.column_names)
assert len(wrong) == 1
assert "_fingerprint" in wrong.column_names
assert "text" not in wrong.column_names
assert right["text"] == ["a", "b"] or list(right["text"]) == ["a", "b"]
PY
