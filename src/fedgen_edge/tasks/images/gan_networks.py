"""The two networks of a GAN, without batch statistics, so that clients in a stack share none.

Source: residual blocks as in Miyato et al. 2018 (arXiv:1802.05957); the critic's class projection,
Miyato and Koyama 2018 (arXiv:1802.05637).
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from fedgen_edge.seeds import seed_global_generators
from fedgen_edge.tasks.images import common, diffusers_io

SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "tiny": ((32, 24, 16), 16),
    "small": ((128, 96, 48, 16), 64),
    "large": ((512, 384, 256, 128), 128),
}
"""Channels of each resolution, the lowest first, and the size of the noise."""


def _make_norm(width: int) -> nn.GroupNorm:
    """Normalization by statistics of one image: clients share none."""
    return nn.GroupNorm(8, width)


class UpBlock(nn.Module):
    """A residual block that doubles the sides; the condition shifts and scales its features."""

    def __init__(self, in_channels: int, out_channels: int, condition_size: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            _make_norm(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.modulate = nn.Linear(condition_size, 2 * out_channels)
        self.norm2, self.conv2 = (
            _make_norm(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Rows in, rows out."""
        upsampled = F.interpolate(F.silu(self.norm1(x)), scale_factor=2.0)
        scale, shift = self.modulate(condition)[..., None, None].chunk(2, 1)
        y = self.norm2(self.conv1(upsampled)) * (1 + scale) + shift
        return self.conv2(F.silu(y)) + self.skip(F.interpolate(x, scale_factor=2.0))


class DownBlock(nn.Module):
    """A residual block that halves the sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Rows in, rows out."""
        y = self.conv2(F.silu(self.conv1(F.silu(x))))
        return F.avg_pool2d(y + self.skip(x), 2)


class GeneratorNetwork(nn.Module):
    """The generator: from noise and a class to an image."""

    def __init__(self, shape: Sequence[int], widths: Sequence[int], noise: int, classes: int):
        super().__init__()
        channels, side, _ = shape
        self.side = side >> (len(widths) - 1)
        self.label = nn.Embedding(classes, noise)
        self.first = nn.Linear(2 * noise, widths[0] * self.side**2)
        pairs = pairwise(widths)
        self.blocks = nn.ModuleList(UpBlock(low, high, 2 * noise) for low, high in pairs)
        self.norm, self.last = _make_norm(widths[-1]), nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        """Values from -1 to 1, `[rows, channels, height, width]`."""
        condition = torch.cat([noise, self.label(label)], 1)
        x = self.first(condition).unflatten(1, (-1, self.side, self.side))
        for block in self.blocks:
            x = block(x, condition)
        return torch.tanh(self.last(F.silu(self.norm(x))))


class CriticNetwork(nn.Module):
    """The critic: from an image and its class to a score, high for real images."""

    def __init__(self, shape: Sequence[int], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(shape[0], widths[-1], 3, padding=1)
        down = widths[::-1]
        pairs = pairwise(down)
        self.blocks = nn.ModuleList(DownBlock(high, low) for high, low in pairs)
        self.label = nn.Embedding(classes, widths[0])
        self.score = nn.Linear(widths[0], 1)

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        """Scores, `[rows]`."""
        x = self.entry(images)
        for block in self.blocks:
            x = block(x)
        features = F.silu(x).mean((-2, -1))
        return self.score(features).squeeze(1) + (features * self.label(label)).mean(1)


class Gan(ModelMixin, ConfigMixin):
    """Both networks as one diffusers model."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 24, 16),
        noise: int = 16,
        num_class_embeds: int = 10,
    ) -> None:
        super().__init__()
        shape = (in_channels, sample_size, sample_size)
        self.generator = GeneratorNetwork(shape, widths, noise, num_class_embeds)
        self.critic = CriticNetwork(shape, widths, num_class_embeds)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        """Generate images from noise and classes."""
        return self.generator(noise, label)


def fresh(size: str, shape: tuple[int, int, int], classes: int, folder: Path) -> None:
    """Write two untrained networks, identical on every machine.

    Args:
        size: one of SIZES.
        shape: the shape of an image: channels, height and width.
        classes: the number of classes.
        folder: the folder to fill.
    """
    widths, noise = SIZES[size]
    side = common.get_halvable_side(shape, len(widths) - 1)
    with seed_global_generators("gan", size):
        network = Gan(side, shape[0], widths, noise, classes)
    diffusers_io.write(network, folder, network.state_dict())
