"""Layers of which PEFT computes another update than ours."""

from pathlib import Path

import torch
from torch import nn

from fedgen_edge.adapters import peft_check, peft_io
from fedgen_edge.adapters.lora import inject
from fedgen_edge.config import Adapter
from fedgen_edge.seeds import generator


def fault(folder: Path, dilation: int) -> str | None:
    """How PEFT's adapter of a convolution differs, where outputs have one size either way."""
    layer = nn.Conv2d(2, 3, 3, padding="same", dilation=dilation)
    model = nn.Sequential(layer)
    settings = Adapter(rank=2, target_modules=("0",))
    lora = inject(model, settings)
    own = peft_check.draw_noisy(lora, generator("noisy"))
    folder.mkdir()
    peft_io.write(folder, own, lora, settings, backbone={}, provenance={})
    x = torch.randn(1, 2, 8, 8, generator=generator("x"))
    return peft_check.compare(folder, model, lora, own, lambda: model(x))


def test_a_dilated_convolution_is_seen_to_be_another_in_peft(tmp_path: Path) -> None:
    assert fault(tmp_path / "plain", 1) is None
    assert fault(tmp_path / "dilated", 2) is not None
