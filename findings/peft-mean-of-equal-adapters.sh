#!/usr/bin/env bash
# PEFT 0.21.2: the mean of two equal adapters, as add_weighted_adapter makes it, is twice the adapter.
#
# combination_type="linear" (the default is "svd") adds the factors, each times the square root of its
# weight. Of two equal adapters with weights 0.5 and 0.5 each factor becomes sqrt(2) times what it was,
# and their product twice. If one of them has both factors negated, which is the same adapter, the
# "mean" is zero. "cat" and "svd" work on products, and give back the adapter.
#
# Seen (peft 0.21.2, torch 2.13.0):
#   linear 2.0000 linear, signs flipped 0.0000 cat 1.0000 svd 1.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=False)), config, "first")
model.add_adapter("second", config)
layer = model.base_model.model[0]


def copy_first(sign):
    for factors in (layer.lora_A, layer.lora_B):
        factors["second"].weight.data.copy_(sign * factors["first"].weight.data)


def share(name, kind):
    """How much of the first adapter is in the mean of both."""
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], name, combination_type=kind)
    with torch.no_grad():
        first, mean = layer.get_delta_weight("first"), layer.get_delta_weight(name)
    return float((mean * first).sum() / first.square().sum())


copy_first(1)
seen = {kind: share(kind, kind) for kind in ("linear", "cat", "svd")}
copy_first(-1)
flipped = share("flipped", "linear")
print(f"linear {seen['linear']:.4f} linear, signs flipped {abs(flipped):.4f} "
      f"cat {seen['cat']:.4f} svd {seen['svd']:.4f}")
assert abs(seen["linear"] - 2) < 1e-4
assert abs(flipped) < 1e-4
assert abs(seen["cat"] - 1) < 1e-4
assert abs(seen["svd"] - 1) < 1e-4
PY
