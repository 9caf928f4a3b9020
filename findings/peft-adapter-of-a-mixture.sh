#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: an adapter of a mixture of experts loads in part, with a warning.
#
# GLM-4 MoE has dense and shared MLPs, whose layers are named gate_proj, up_proj and down_proj as the
# routed experts' once were. Loading rewrites these targets into parameters of the fused experts; the
# factors of the dense and shared layers, which are in the file, find no layer, and stay out. Logits are
# those of another adapter. Targets in attention alone load whole.
#
# Seen (peft 0.21.2, transformers 5.24.0, torch 2.13.0): 12 of 28 tensors of the file were not loaded
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
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

config = Glm4MoeConfig(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, moe_intermediate_size=32, n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
)


def left_out(wanted):
    """Tensors of the file, and those of them that are not in the loaded adapter."""
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config).eval()
    layers = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.rpartition(".")[2] in wanted
    }
    LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=sorted(wanted)).save_pretrained("adapter")
    factors = {}
    for name, weight in layers.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, weight.shape[1])
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    save_file(factors, "adapter/adapter_model.safetensors")
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, "adapter"))
    return len(factors), len({*load_file("adapter/adapter_model.safetensors")} - {*loaded})


attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
whole, none = left_out(attention)
everything, lost = left_out(attention | {"gate_proj", "up_proj", "down_proj"})
print(f"{lost} of {everything} tensors of the file were not loaded; of attention alone {none} of {whole}")
assert none == 0
assert lost > 0
PY
