"""The network of the task `vae`: a class-conditional convolutional autoencoder, saved by diffusers.

Residual blocks as in He et al. 2016 (arXiv:1603.05027), with GroupNorm, so that no picture's
numbers depend on the others of its batch.
"""

import math
from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8
"""Of channels, in each GroupNorm."""


class ResidualBlock(nn.Module):
    """Two convolutions beside a way around them; the class moves what lies between."""

    def __init__(self, in_channels: int, out_channels: int, condition_size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.by_class = nn.Linear(condition_size, out_channels)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Channels before to channels after, on the same grid."""
        inner = self.conv1(F.silu(self.norm1(x))) + self.by_class(condition)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(inner)))


class Encoder(nn.Module):
    """From a picture to its latent's mean and log-variance; each width halves the grid."""

    def __init__(
        self, channels: int, widths: list[int], depth: int, bottom: int, latent: int
    ) -> None:
        super().__init__()
        self.depth = depth
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = _make_blocks(widths, depth)
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.to_latent = nn.Linear(bottom, 2 * latent)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`[rows, 2 * latent]`."""
        x = self.conv_in(x)
        for at, block in enumerate(self.blocks):
            if at and at % self.depth == 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = block(x, condition)
        return self.to_latent(F.silu(self.norm(x)).flatten(1))


class Decoder(nn.Module):
    """From a latent to the mean and the log-scale of each of a picture's values."""

    def __init__(
        self,
        channels: int,
        widths: list[int],
        depth: int,
        sides: list[tuple[int, int]],
        latent: int,
    ) -> None:
        super().__init__()
        self.depth, self.sides = depth, sides
        self.from_latent = nn.Linear(latent, widths[0] * math.prod(sides[0]))
        self.blocks = _make_blocks(widths, depth)
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, latent: Tensor, condition: Tensor) -> Tensor:
        """`[rows, 2 * channels, height, width]`."""
        x = self.from_latent(latent).unflatten(1, (-1, *self.sides[0]))
        for at, block in enumerate(self.blocks):
            if at and at % self.depth == 0:
                height, width = self.sides[at // self.depth]
                x = F.interpolate(x, scale_factor=2.0)[..., :height, :width]
            x = block(x, condition)
        return self.conv_out(F.silu(self.norm(x)))


def _make_blocks(widths: list[int], depth: int) -> nn.ModuleList:
    """So many blocks of each width; `told` is as wide as the widest."""
    block_widths = [width for width in widths for _ in range(depth)]
    pairs = zip([widths[0], *block_widths], block_widths, strict=False)
    return nn.ModuleList(ResidualBlock(before, after, max(widths)) for before, after in pairs)


class Autoencoder(ModelMixin, ConfigMixin):
    """An encoder and a decoder that both know the picture's class.

    The decoder comes last, its blocks numbered, so that FedPer's last layer is the one before the
    picture.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: Sequence[int] = (8, 8),
        in_channels: int = 1,
        num_class_embeds: int = 10,
        block_out_channels: Sequence[int] = (16, 32),
        layers_per_block: int = 1,
        latent: int = 16,
    ) -> None:
        """Sizes, by diffusers' names where it has one.

        Args:
            sample_size: height and width of a picture.
            in_channels: of a picture.
            num_class_embeds: classes.
            block_out_channels: of each grid, the picture's first; each a multiple of 8.
            layers_per_block: residual blocks on each grid.
            latent: numbers that stand for a picture.
        """
        super().__init__()
        widths, depth = list(block_out_channels), layers_per_block
        sides = [
            (-(-sample_size[0] // 2**level), -(-sample_size[1] // 2**level))
            for level in range(len(widths))
        ]
        bottom = widths[-1] * math.prod(sides[-1])
        self.class_embedding = nn.Embedding(num_class_embeds, max(widths))
        self.encoder = Encoder(in_channels, widths, depth, bottom, latent)
        self.decoder = Decoder(in_channels, widths[::-1], depth, sides[::-1], latent)

    def encode(
        self, images: Float[Tensor, "rows channels height width"], label: Int[Tensor, " rows"]
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, `[rows, latent]` each."""
        mean, log_variance = self.encoder(images, self.class_embedding(label)).chunk(2, 1)
        return mean, log_variance

    def decode(
        self, latent: Float[Tensor, "rows latent"], label: Int[Tensor, " rows"]
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of each value, `[rows, channels, height, width]` each."""
        mean, scale = self.decoder(latent, self.class_embedding(label)).chunk(2, 1)
        return mean, scale

    def forward(self, images: Tensor, label: Tensor, noise: Tensor) -> Any:
        """What `encode` says of a picture, and `decode` of the latent that the noise draws."""
        latent_mean, log_variance = self.encode(images, label)
        return (
            latent_mean,
            log_variance,
            *self.decode(latent_mean + (log_variance / 2).exp() * noise, label),
        )
