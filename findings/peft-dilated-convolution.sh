#!/usr/bin/env bash
# PEFT 0.21.2: LoRA on a convolution with dilation computes one thing and merges another.
#
# The convolution by which LoRA's factor A reads the input is made without the dilation of the layer
# that it adapts. Where the two outputs happen to have one shape (here: a stride of 4), nothing is said;
# elsewhere the forward pass fails. Merging puts the factors into the dilated kernel, so that the merged
# model differs from the adapted one. Without dilation both agree.
#
# Seen (peft 0.21.2, torch 2.13.0):
#   largest difference between adapted and merged: dilation 1: 2.4e-07, dilation 2: 4.57
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


def difference(dilation):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, stride=4, dilation=dilation, padding=1, bias=False)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        adapted = model(x)
        merged = model.merge_and_unload()(x)
    assert adapted.shape == merged.shape
    return float((adapted - merged).abs().max())


plain, dilated = difference(1), difference(2)
print(f"adapted less merged: dilation 1: {plain:.1e}, dilation 2: {dilated:.2f}")
assert plain < 1e-5
assert dilated > 0.1
PY
