"""TAEF2: a tiny autoencoder of 32 latent channels, eight pixels a side for each latent value.

Its weights are those of madebyollin's TAESD repository (MIT) for FLUX.2's latents, two files:
`taef2_encoder.safetensors` and `taef2_decoder.safetensors`.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedgen_edge.tasks.backbones.loading import describe

WIDTH = 64
"""Channels between the first and the last layer."""
LATENT = 32
"""Channels of a latent."""
FACTOR = 8
"""Pixels per latent value along each side."""
MIN_SIDE = 64
"""Least side in pixels: below it, latents preserve little of an image."""
FILES = ("taef2_encoder.safetensors", "taef2_decoder.safetensors")
# Mean and standard deviation of each channel over the latents of 2,000 training images of
# CIFAR-10, evenly spaced over a fifth of each class (data.public=0.2), scaled to 64 pixels a side.
MEAN = (
    0.262, -0.258, 0.28, 0.114, 0.308, -0.461, -0.231, 0.357, -0.014, -0.048, 0.396, 0.335, 0.103,
    0.138, -0.756, 0.205, -0.292, -0.07, -0.174, 0.33, 0.003, 0.063, 0.305, -0.467, 0.39, -0.656,
    -0.329, -0.204, 0.277, 0.49, 0.107, 0.185,
)  # fmt: skip
STD = (
    0.703, 0.913, 0.89, 1.079, 0.668, 0.908, 1.067, 0.661, 1.069, 0.542, 0.57, 1.14, 0.646, 0.599,
    0.7, 0.974, 0.665, 0.558, 0.649, 1.019, 0.603, 0.527, 0.665, 0.627, 0.893, 0.703, 0.869, 0.843,
    0.601, 0.943, 0.607, 0.865,
)  # fmt: skip


class TaesdBlock(nn.Module):
    """Three convolutions with a shortcut; in the middle of the network, a normalized pool first.

    The names of its parts match the file.
    """

    def __init__(self, *, has_pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_make_conv(), nn.ReLU(), _make_conv(), nn.ReLU(), _make_conv())
        self.pool = _make_pool() if has_pool else None

    def forward(self, x: Tensor) -> Tensor:
        """Output of the same shape."""
        x = x if self.pool is None else x + self.pool(x)
        return (x + self.conv(x)).relu()


class SoftClamp(nn.Module):
    """Softly limits values to -3 to 3."""

    def forward(self, x: Tensor) -> Tensor:
        """Output of the same shape."""
        return 3 * (x / 3).tanh()


def _make_conv(
    inner: int = WIDTH, outer: int = WIDTH, *, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, stride, padding=1, bias=bias)


def _make_pool() -> nn.Sequential:
    inner_channels = 4 * WIDTH
    return nn.Sequential(
        nn.Conv2d(WIDTH, inner_channels, 1, bias=False),
        nn.GroupNorm(4, inner_channels),
        nn.ReLU(),
        nn.Conv2d(inner_channels, WIDTH, 1, bias=False),
    )


def _make_blocks(*, has_pool: bool = False) -> list[nn.Module]:
    return [TaesdBlock(has_pool=has_pool) for _ in range(3)]


def make_encoder() -> nn.Sequential:
    """A network from `[rows, 3, height, width]`, 0 to 1, to `[rows, 32, height / 8, width / 8]`."""
    downsamplers = [_make_conv(stride=2, bias=False) for _ in range(3)]
    return nn.Sequential(
        _make_conv(3), TaesdBlock(), downsamplers[0], *_make_blocks(), downsamplers[1],
        *_make_blocks(), downsamplers[2], *_make_blocks(has_pool=True), _make_conv(outer=LATENT),
    )  # fmt: skip


def make_decoder() -> nn.Sequential:
    """Network from `[rows, 32, height, width]` to `[rows, 3, 8 height, 8 width]`, about 0 to 1."""
    upsamplers = [[nn.Upsample(scale_factor=2), _make_conv(bias=False)] for _ in range(3)]
    return nn.Sequential(
        SoftClamp(), _make_conv(LATENT), nn.ReLU(), *_make_blocks(has_pool=True), *upsamplers[0],
        *_make_blocks(), *upsamplers[1], *_make_blocks(), *upsamplers[2], TaesdBlock(),
        _make_conv(outer=3),
    )  # fmt: skip


def load(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder with the folder's weights, in float32.

    Raises:
        ValueError: a file is missing or damaged, or holds another network; one line.
    """
    parts = (make_encoder(), make_decoder())
    for network, name in zip(parts, FILES, strict=True):
        try:
            weights = load_file(folder / name)
            network.load_state_dict({k: v.float() for k, v in weights.items()})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{name}: {describe(error, 160)}") from None
    return parts
