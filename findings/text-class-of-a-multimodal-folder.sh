#!/usr/bin/env bash
# transformers 5.24.0: the text class of a multimodal model loads its folder with random weights.
#
# Gemma3ForCausalLM.from_pretrained(FOLDER) of a folder that Gemma3ForConditionalGeneration wrote
# finds no tensor by its names, draws all of them, and says so in a line of the log alone. The
# logits are another model's, another one at each loading. AutoModelForCausalLM takes the class of
# the folder, and is right.
#
# Seen (transformers 5.24.0, torch 2.13.0): largest difference of logits: text class 0.42, auto class 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
cd "$folder"
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import (
    AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, logging,
)

logging.set_verbosity_error()
torch.manual_seed(0)
text = dict(
    vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)
vision = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14,
)
model = Gemma3ForConditionalGeneration(
    Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=259,
        boi_token_index=257, eoi_token_index=258,
    )
).eval()
model.save_pretrained("model")
ids = torch.arange(2, 20)[None]


def difference(kind):
    with torch.no_grad():
        loaded = kind.from_pretrained("model").eval()
        return float((loaded(ids).logits - model(ids).logits).abs().max())


text_class, auto_class = difference(Gemma3ForCausalLM), difference(AutoModelForCausalLM)
print(f"largest difference of logits: text class {text_class:.2f}, auto class {auto_class:.2f}")
assert text_class > 0.1
assert auto_class == 0
PY
