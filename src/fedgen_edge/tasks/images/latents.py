"""Convert images to latents and back, with an autoencoder between a network and the images.

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
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.backbones.loading import FAILURES, describe
from fedgen_edge.tasks.images import common, diffusers_io, taef2

KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
BATCH_SIZE = 32
"""Images that are encoded or decoded in one forward pass."""
ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class LatentAutoencoder:
    """A frozen autoencoder whose latents have about mean 0 and variance 1 in each channel."""

    encoder: Callable[[Tensor], Tensor]
    """Encodes values between -1 and 1, `[rows, colors, height, width]`."""
    decoder: Callable[[Tensor], Tensor]
    colors: int
    """Channels of an image."""
    channels: int
    """Channels of a latent."""
    factor: int
    """Pixels per latent value along each side."""
    mean: Tensor
    """Mean of the encoder's raw output, `[channels or 1, 1, 1]`; on the device."""
    std: Tensor
    """Standard deviation of the encoder's raw output, in the same shape."""
    sha256: str
    """Hash of its weights."""
    min_side: int = 1
    """Least side in pixels: smaller images are scaled up."""

    def get_latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """The shape of latents (channels, height, width) for images of this shape."""
        _, height, width = image_shape
        scale = max(1.0, self.min_side / min(height, width))
        sides = [math.ceil(side * scale / self.factor) for side in (height, width)]
        return self.channels, sides[0], sides[1]

    def get_image_shape(self, shape: ImageShape) -> ImageShape:
        """The shape of the images that the autoencoder decodes from latents of this shape."""
        return self.colors, shape[1] * self.factor, shape[2] * self.factor

    @torch.no_grad()
    def encode(self, pixels: Tensor, shape: ImageShape) -> Tensor:
        """Latents of images, which are first scaled to fit latents of this shape.

        Args:
            pixels: uint8 `[rows, colors, height, width]`.
            shape: the shape of a latent.

        Returns:
            float32 `[rows, channels, height, width]`, on the CPU.

        Choice: the mode of the autoencoder's distribution, so that an image has one latent.
        """
        encoded = [pixels.new_zeros(0, *shape, dtype=torch.float32)]
        for part in pixels.split(BATCH_SIZE) if len(pixels) else ():
            values = common.to_values(part.to(self.mean.device))
            resized = resize(values, self.get_image_shape(shape)[1:])
            encoded.append(((self.encoder(resized) - self.mean) / self.std).cpu())
        return torch.cat(encoded)

    @torch.no_grad()
    def decode(self, latents: Tensor, image_shape: ImageShape) -> Tensor:
        """Images of this shape, values between -1 and 1, from latents on the device."""
        parts = (self.decoder(z * self.std + self.mean) for z in latents.split(BATCH_SIZE))
        return torch.cat([resize(part.clamp(-1, 1), image_shape[1:]) for part in parts])


def resize(values: Tensor, sides: tuple[int, int]) -> Tensor:
    """Images resized to these sides: area means to shrink, bicubic to enlarge."""
    if tuple(values.shape[-2:]) == sides:
        return values
    if values.shape[-1] > sides[-1]:
        return F.interpolate(values, sides, mode="area")
    return F.interpolate(values, sides, mode="bicubic", align_corners=False).clamp(-1, 1)


def load(folder: Path, device: torch.device) -> LatentAutoencoder:
    """The autoencoder in a diffusers folder, or in one with TAEF2's two files, in float32.

    Raises:
        ConfigError: the folder has no usable autoencoder.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _make_error(folder, "holds no safetensors weights (pickles are not read): convert it")
    try:
        if any(path.name in taef2.FILES for path in weights):
            return _load_taef2(folder, device)
        return _load_from_diffusers(folder, weights, device)
    except FAILURES as error:
        raise _make_error(
            folder, f"is no autoencoder here ({describe(error)}): take another"
        ) from None


def _make_error(folder: Path, problem: str) -> ConfigError:
    return ConfigError(f"backbone.autoencoder={str(folder)!r} {problem}")


def _load_taef2(folder: Path, device: torch.device) -> LatentAutoencoder:
    encoder, decoder = (part.eval().to(device).requires_grad_(False) for part in taef2.load(folder))
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1)
                    for v in (taef2.MEAN, taef2.STD))  # fmt: skip
    return LatentAutoencoder(
        lambda values: encoder((values + 1) / 2),
        lambda latents: decoder(latents) * 2 - 1,
        colors=3,
        channels=taef2.LATENT,
        factor=taef2.FACTOR,
        mean=mean,
        std=std,
        sha256=pretrained.hash_weights([folder / name for name in taef2.FILES]),
        min_side=taef2.MIN_SIDE,
    )


def _load_from_diffusers(
    folder: Path, weights: list[Path], device: torch.device
) -> LatentAutoencoder:
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in KINDS:
        raise ValueError(f"its config.json names {name!r}, not {' or '.join(KINDS)}")
    autoencoder = diffusers_io.load_complete(KINDS[name], folder, torch.float32).eval().to(device)
    autoencoder.requires_grad_(False)
    config, is_kl = autoencoder.config, name == "AutoencoderKL"
    return LatentAutoencoder(
        (lambda x: autoencoder.encode(x).latent_dist.mode())
        if is_kl
        else lambda x: autoencoder.encode(x).latents,
        lambda z: autoencoder.decode(z).sample,
        colors=config["in_channels"],
        channels=config["latent_channels"],
        factor=2 ** (len(config["block_out_channels"]) - 1),
        mean=_make_channel_tensor(
            config.get("latents_mean") or config.get("shift_factor") or 0.0, device
        ),
        std=_make_channel_tensor(config.get("latents_std") or 1.0, device)
        / config["scaling_factor"],
        sha256=pretrained.hash_weights(weights),
    )


def _make_channel_tensor(value: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1)
