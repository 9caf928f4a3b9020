#!/usr/bin/env bash
# transformers 5.24.0: in a mixture of experts, a text's logits depend on the other texts of its batch.
#
# The tokens of an expert are multiplied together, and how a float32 product is summed depends on how
# many they are. So a row's logits change in their last bits with the text beside it, padding or not; a
# dense model's do not. Tests that ask for equality to the bit, of packing or of attention masks, refuse
# sound mixtures at random.
#
# Seen (transformers 5.24.0, torch 2.13.0): mixtures 18 of 20 seeds, dense models 0 of 20
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
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = dict(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)
experts = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
row = [5, 6, 7]


def changes(make):
    """Seeds of 20 with which the first row's logits depend on the second row."""
    count, largest = 0, 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            one, two = (
                model(torch.tensor([row, other])).logits[0] for other in ([8, 9, 10], [80, 90, 100])
            )
        count += not torch.equal(one, two)
        largest = max(largest, float((one - two).abs().max()))
    return count, largest


mixtures, largest = changes(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)))
dense, _ = changes(lambda: Qwen3ForCausalLM(Qwen3Config(**sizes)))
print(f"mixtures {mixtures} of 20 seeds (by up to {largest:.1e}), dense models {dense} of 20")
assert mixtures >= 5
assert largest < 1e-5
assert dense == 0
PY
