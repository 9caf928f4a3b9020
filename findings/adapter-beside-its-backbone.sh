#!/usr/bin/env bash
# transformers 5.24.0: a model's folder in which PEFT also wrote an adapter loads with the adapter in it.
#
# save_pretrained() of the PEFT model into the folder of its backbone is enough. From then on
# AutoModelForCausalLM.from_pretrained(FOLDER) gives another model than before, and its loading info
# (missing, unexpected, mismatched keys) is as empty as before.
#
# Seen (transformers 5.24.0, peft 0.21.2, torch 2.13.0): 4 factors of LoRA in what is loaded
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
cd "$folder"
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)
LlamaForCausalLM(config).save_pretrained("model")
ids = torch.arange(9)[None]


def load():
    model, info = AutoModelForCausalLM.from_pretrained("model", output_loading_info=True)
    factors = [name for name, _ in model.named_parameters() if "lora" in name]
    with torch.no_grad():
        return factors, model.eval()(ids).logits, info


none, before, _ = load()
wanted = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(AutoModelForCausalLM.from_pretrained("model"), wanted).save_pretrained("model")
factors, after, info = load()
told = [key for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[keys]]
print(f"{len(none)}, then {len(factors)} factors of LoRA in what is loaded; told of: {told}")
assert not none
assert len(factors) == 4
assert not torch.equal(before, after)
assert not told
PY
