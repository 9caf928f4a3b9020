#!/usr/bin/env bash
# transformers 5.24.0: BART's decoder takes position_ids, and computes as if there were none.
#
# forward() ends in **kwargs, so that the argument is no error; positions are counted from the start of
# the row whatever it says. GPT-2 obeys it. Whoever packs several documents into a row, and begins each
# at position 0, trains another model than the one that is served. MBart, Marian, Pegasus, Blenderbot and
# TrOCR are alike.
#
# Seen (transformers 5.24.0, torch 2.13.0):
#   largest change of the logits by position_ids: bart 0.0000, gpt2 0.2882
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoModelForCausalLM, BartConfig, GPT2Config

bart = BartConfig(
    vocab_size=40, d_model=16, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
    encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16, max_position_embeddings=32,
    is_decoder=True, is_encoder_decoder=False,
)
gpt2 = GPT2Config(
    vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
)


def change(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        first, second = (
            model(ids, position_ids=start + torch.arange(6).view(1, 6)).logits for start in (0, 10)
        )
    return float((first - second).abs().max())


ignored, obeyed = change(bart), change(gpt2)
print(f"largest change of the logits by position_ids: bart {ignored:.4f}, gpt2 {obeyed:.4f}")
assert ignored == 0
assert obeyed > 0.1
PY
