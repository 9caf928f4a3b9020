#!/usr/bin/env bash
# PEFT 0.21.2: a LoRA of rank 2 on an embedding is saved together with the whole frozen embedding.
#
# save_pretrained() decides so where a target is an embedding layer (save_embedding_layers="auto"; a
# warning says so). What a client sends is then the backbone's largest matrix. Other readers of PEFT
# folders have to know the key, "embed_tokens.base_layer.weight", which is no part of the adapter.
#
# Seen (peft 0.21.2, transformers 5.24.0; a vocabulary of 1,000, width 32):
#   32000 of 34064 saved numbers are the frozen embedding; without them the adapter loads the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
)
backbone = LlamaForCausalLM(config).eval()
wanted = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
model = get_peft_model(copy.deepcopy(backbone), wanted).eval()
ids = torch.arange(6).view(1, 6)


def logits(save):
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder, save_embedding_layers=save)
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), folder).eval()
    with torch.no_grad():
        return load_file(f"{folder}/adapter_model.safetensors"), loaded(ids).logits


by_default, first = logits("auto")
alone, second = logits(False)
frozen = sum(v.numel() for k, v in by_default.items() if "base_layer" in k)
saved = sum(v.numel() for v in by_default.values())
print(f"{frozen} of {saved} saved numbers are the frozen embedding")
assert frozen == 1000 * 32
assert saved - frozen == sum(v.numel() for v in alone.values()) == 2 * (1000 + 32)
assert torch.equal(first, second)
PY
