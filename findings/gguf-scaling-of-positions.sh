#!/usr/bin/env bash
# transformers 5.24.0: linear scaling of rotary positions in a GGUF file is dropped without a word.
#
# llama.rope.scaling.type = linear and llama.rope.scaling.factor = 4 are what a model of a stretched
# context has in its header. from_pretrained(gguf_file=...) gives rope_type "default": another model
# beyond the first token. The loading info is empty.
#
# Seen (transformers 5.24.0, gguf 0.19.0, torch 2.13.0): rope_type default, with and without the keys
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
cd "$folder"
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/python" -W ignore - <<'PY' 2>/dev/null
import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
width, heads, inner, layers, vocabulary = 32, 4, 64, 2, 99
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=heads,
))


def write(path, scaled):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            target = f"blk.{number}.{NAMES[stem]}.weight"
        else:
            target = f"{NAMES[stem]}.weight"
        writer.add_tensor(target, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


seen = []
for scaled in (False, True):
    write("model.gguf", scaled)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", output_loading_info=True
    )
    seen.append(loaded.config.rope_parameters["rope_type"])
    assert not info["missing_keys"] and not info["unexpected_keys"]
print(f"rope_type without the keys: {seen[0]}, with them: {seen[1]}")
assert seen == ["default", "default"]
PY
