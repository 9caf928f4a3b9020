"""The network of the task `vae`: a class-conditional convolutional autoencoder, saved by diffusers.

Residual blocks as in He et al. 2016 (arXiv:1603.05027), with GroupNorm, so that an image's results
do not depend on the rest of its batch.
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
"""Channel groups in each GroupNorm."""


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection; the class shifts the features between them."""

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
        """From `before` to `after` channels, at the same resolution."""
        inner = self.conv1(F.silu(self.norm1(x))) + self.by_class(condition)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(inner)))


class Encoder(nn.Module):
    """From an image to its latent's mean and log-variance; each width halves the resolution."""

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
        """Mean and log-variance, `[rows, 2 * latent]`."""
        x = self.conv_in(x)
        for at, block in enumerate(self.blocks):
            if at and at % self.depth == 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = block(x, condition)
        return self.to_latent(F.silu(self.norm(x)).flatten(1))


class Decoder(nn.Module):
    """From a latent to the mean and log-scale of each value of an image."""

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
        """Mean and log-scale, `[rows, 2 * channels, height, width]`."""
        x = self.from_latent(latent).unflatten(1, (-1, *self.sides[0]))
        for at, block in enumerate(self.blocks):
            if at and at % self.depth == 0:
                height, width = self.sides[at // self.depth]
                x = F.interpolate(x, scale_factor=2.0)[..., :height, :width]
            x = block(x, condition)
        return self.conv_out(F.silu(self.norm(x)))


def _make_blocks(widths: list[int], depth: int) -> nn.ModuleList:
    """`depth` blocks of each width; the class embedding is as wide as the widest."""
    block_widths = [width for width in widths for _ in range(depth)]
    pairs = zip([widths[0], *block_widths], block_widths, strict=False)
    return nn.ModuleList(ResidualBlock(before, after, max(widths)) for before, after in pairs)


class Autoencoder(ModelMixin, ConfigMixin):
    """An encoder and a decoder that are both conditioned on the image's class.

    The decoder comes last, with numbered blocks, so that FedPer's last layer is the one before the
    image.
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
        """Build the network; sizes have diffusers' names where those exist.

        Args:
            sample_size: height and width of an image.
            in_channels: channels of an image.
            num_class_embeds: number of classes.
            block_out_channels: channels of each resolution, the image's first; multiples of 8.
            layers_per_block: residual blocks at each resolution.
            latent: size of an image's latent.
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
        """Outputs of `encode` for an image, and of `decode` for a latent sampled with the noise."""
        latent_mean, log_variance = self.encode(images, label)
        return (
            latent_mean,
            log_variance,
            *self.decode(latent_mean + (log_variance / 2).exp() * noise, label),
        )
