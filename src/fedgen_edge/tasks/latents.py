"""Pictures as latents, and back: an autoencoder stands between a network and the pictures.

Source: Rombach et al. 2022 (arXiv:2112.10752).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks import backbones, folders, pictures, taef2
from fedgen_edge.tasks.loading import FAILURES, describe

KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
AT_ONCE = 32
"""Pictures that are encoded or decoded in one pass."""
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Autoencoder:
    """A frozen one. Its latents have about mean 0 and variance 1 in each channel."""

    encoder: Callable[[Tensor], Tensor]
    """From values between -1 and 1, `[rows, colours, height, width]`."""
    decoder: Callable[[Tensor], Tensor]
    colours: int
    """Channels of a picture."""
    channels: int
    """Of a latent."""
    factor: int
    """Pixels of a side for each value of a latent's side."""
    mean: Tensor
    """Of the encoder's own numbers, `[channels or 1, 1, 1]`; on the device."""
    spread: Tensor
    """Their standard deviation, alike."""
    sha256: str
    """Of its weights."""
    least: int = 1
    """Pixels of a side below which pictures are scaled up."""

    def shape(self, picture: Shape) -> Shape:
        """Of a latent: channels, height and width, for pictures of this shape."""
        _, height, width = picture
        grown = max(1.0, self.least / min(height, width))
        sides = [math.ceil(side * grown / self.factor) for side in (height, width)]
        return self.channels, sides[0], sides[1]

    def picture(self, shape: Shape) -> Shape:
        """Of the pictures that the autoencoder itself makes of latents of this shape."""
        return self.colours, shape[1] * self.factor, shape[2] * self.factor

    @torch.no_grad()
    def encode(self, pixels: Tensor, shape: Shape) -> Tensor:
        """Latents of pictures, which are scaled to what becomes a latent of this shape.

        Args:
            pixels: uint8 `[rows, colours, height, width]`.
            shape: of a latent.

        Returns:
            float32 `[rows, channels, height, width]`, on the processor.

        Choice: the mode of an autoencoder's distribution, so that a picture has one latent.
        """
        made = [pixels.new_zeros(0, *shape, dtype=torch.float32)]
        for part in pixels.split(AT_ONCE) if len(pixels) else ():
            values = pictures.values(part.to(self.mean.device))
            fitted = scaled(values, self.picture(shape)[1:])
            made.append(((self.encoder(fitted) - self.mean) / self.spread).cpu())
        return torch.cat(made)

    @torch.no_grad()
    def decode(self, latents: Tensor, picture: Shape) -> Tensor:
        """Values between -1 and 1 of pictures of this shape, from latents on the device."""
        parts = (self.decoder(z * self.spread + self.mean) for z in latents.split(AT_ONCE))
        return torch.cat([scaled(part.clamp(-1, 1), picture[1:]) for part in parts])


def scaled(values: Tensor, sides: tuple[int, int]) -> Tensor:
    """Pictures of these sides: each pixel a mean where they shrink, bicubic where they grow."""
    if tuple(values.shape[-2:]) == sides:
        return values
    if values.shape[-1] > sides[-1]:
        return F.interpolate(values, sides, mode="area")
    return F.interpolate(values, sides, mode="bicubic", align_corners=False).clamp(-1, 1)


def load(folder: Path, device: torch.device) -> Autoencoder:
    """The autoencoder in a folder of diffusers', or in one with TAEF2's two files, in float32.

    Raises:
        ConfigError: there is none that can be used.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _fault(folder, "holds no safetensors weights (pickles are not read): convert it")
    try:
        if any(path.name in taef2.FILES for path in weights):
            return _taef2(folder, device)
        return _of_diffusers(folder, weights, device)
    except FAILURES as error:
        raise _fault(folder, f"is no autoencoder here ({describe(error)}): take another") from None


def _fault(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"backbone.autoencoder={str(folder)!r} {what}")


def _taef2(folder: Path, device: torch.device) -> Autoencoder:
    encoder, decoder = (part.eval().to(device).requires_grad_(False) for part in taef2.load(folder))
    mean, spread = (torch.tensor(v, device=device).view(-1, 1, 1)
                    for v in (taef2.MEAN, taef2.SPREAD))  # fmt: skip
    return Autoencoder(
        lambda values: encoder((values + 1) / 2),
        lambda latents: decoder(latents) * 2 - 1,
        colours=3,
        channels=taef2.LATENT,
        factor=taef2.FACTOR,
        mean=mean,
        spread=spread,
        sha256=backbones.digest([folder / name for name in taef2.FILES]),
        least=taef2.LEAST,
    )


def _of_diffusers(folder: Path, weights: list[Path], device: torch.device) -> Autoencoder:
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in KINDS:
        raise ValueError(f"its config.json names {name!r}, not {' or '.join(KINDS)}")
    made = folders.whole(KINDS[name], folder, torch.float32).eval().to(device)
    made.requires_grad_(False)
    told, is_kl = made.config, name == "AutoencoderKL"
    return Autoencoder(
        (lambda x: made.encode(x).latent_dist.mode())
        if is_kl
        else lambda x: made.encode(x).latents,
        lambda z: made.decode(z).sample,
        colours=told["in_channels"],
        channels=told["latent_channels"],
        factor=2 ** (len(told["block_out_channels"]) - 1),
        mean=_per_channel(told.get("latents_mean") or told.get("shift_factor") or 0.0, device),
        spread=_per_channel(told.get("latents_std") or 1.0, device) / told["scaling_factor"],
        sha256=backbones.digest(weights),
    )


def _per_channel(value: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1)
