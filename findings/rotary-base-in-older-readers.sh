#!/usr/bin/env bash
# transformers 5.24.0 writes folders that 4.49.0 reads with another rotary base, without a word.
#
# Since 5.0 config.json has "rope_parameters": {"rope_theta": ...}, and no "rope_theta" beside it. A
# reader of the older layout finds none, and takes its default of 10,000: transformers 4.49 here, and
# others that read that field alike. The logits differ; with the field written as well they are the same.
#
# Seen (transformers 5.24.0 and 4.49.0, torch 2.13.0, a Llama with theta 100,000):
#   as written: theta 10000.0, logits off by up to 20.8; with the field: theta 100000.0, 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.5, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    logits = model(torch.arange(64).view(1, 64)).logits
torch.save(logits, f"{folder}/logits.pt")
for name in ("as-written", "with-field"):
    model.save_pretrained(f"{folder}/{name}")
written = json.load(open(f"{folder}/with-field/config.json"))
assert "rope_theta" not in written
json.dump({**written, "rope_theta": 100000.0}, open(f"{folder}/with-field/config.json", "w"))
PY
"${pip[@]}" transformers==4.49.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
logits = torch.load(f"{folder}/logits.pt")
seen = {}
for name in ("as-written", "with-field"):
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}").eval()
    with torch.no_grad():
        error = (model(torch.arange(64).view(1, 64)).logits - logits).abs().max()
    seen[name] = (model.config.rope_theta, float(error))
    print(f"{name}: theta {seen[name][0]}, largest difference of logits {seen[name][1]:.2e}")
assert seen["as-written"][0] == 10000.0
assert seen["as-written"][1] > 1e-3
assert seen["with-field"][0] == 100000.0
assert seen["with-field"][1] < 1e-5 * float(logits.abs().max())
PY
