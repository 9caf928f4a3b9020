"""Feature networks for images, with the tensor names of their published weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = int | tuple[int, int]
HORIZONTAL, VERTICAL = (1, 7), (7, 1)
"""Kernels that together make one of 7 x 7."""


class Layer(NamedTuple):
    """One convolution, or two with different kernels side by side."""

    out: int
    """Output channels of each."""
    kernel: Kernel
    stride: int = 1
    """If above 1, the edge is not padded."""
    second_kernel: Kernel | None = None
    """Kernel of the second convolution."""


class Residual(nn.Module):
    """Two convolutions beside a shortcut without weights (He et al. 2016, option A)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.stride, self.extra_channels = out // width, out - width
        self.conv1 = nn.Conv2d(width, out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, width, h, w]` to `[n, out, h / stride, w / stride]`."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # the missing channels are zeros, half before and half after
        sides = (0, 0, 0, 0, self.extra_channels // 2, self.extra_channels // 2)
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], sides))


class ResNet(nn.Module):
    """The residual network for CIFAR-10 with 6 n + 2 layers: n blocks at each of three sizes.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16] * blocks, [16] + [32] * (blocks - 1), [32] + [64] * (blocks - 1)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Residual(width, out) for width in own))
            for own, out in zip(widths, (16, 32, 64), strict=True)
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to the pooled features before the last layer, `[n, 64]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(y))).mean((2, 3))


class Convolution(nn.Module):
    """A convolution, its normalization and a ReLU."""

    def __init__(
        self, width: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, width, h, w]` to `[n, out, ...]`."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, the last of them after pooling.

    Layers are named by branch and position: `branch5x5_2`; those of a pair have one more letter.
    """

    def __init__(self, width: int, branches: dict[str, list[Layer]], pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.names: list[list[list[str]]] = []
        """For each branch and each position in it, the names of its one or two convolutions."""
        for branch, layers in branches.items():
            self.names.append([])
            channels = width
            for place, layer in enumerate(layers, 1):
                name = branch if len(layers) == 1 else f"{branch}_{place}"
                channels = self._add_layer(name, channels, layer)

    def _add_layer(self, name: str, width: int, layer: Layer) -> int:
        """Add a layer to the last branch, and return its output channels."""
        kernels = {name: layer.kernel}
        if layer.second_kernel is not None:
            kernels = {f"{name}a": layer.kernel, f"{name}b": layer.second_kernel}
        for key, kernel in kernels.items():
            high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (high // 2, wide // 2) if layer.stride == 1 else 0
            convolution = Convolution(width, layer.out, kernel, layer.stride, padding)
            self.add_module(key, convolution)
        self.names[-1].append(list(kernels))
        return layer.out * len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches' outputs for `[n, width, h, w]` along channels."""
        outputs = []
        for at, places in enumerate(self.names, 1):
            y = x if at < len(self.names) else self.pool(x)
            for names in places:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _average_pool() -> nn.Module:
    """Make TensorFlow's average pooling, which does not count padding."""
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def _inception_a(width: int, pooled: int) -> Mixed:
    branches = {
        "branch1x1": [Layer(64, 1)],
        "branch5x5": [Layer(48, 1), Layer(64, 5)],
        "branch3x3dbl": [Layer(64, 1), Layer(96, 3), Layer(96, 3)],
        "branch_pool": [Layer(pooled, 1)],
    }
    return Mixed(width, branches, _average_pool())


def _inception_b(width: int) -> Mixed:
    branches = {
        "branch3x3": [Layer(384, 3, 2)],
        "branch3x3dbl": [Layer(64, 1), Layer(96, 3), Layer(96, 3, 2)],
        "branch_pool": [],
    }
    return Mixed(width, branches, nn.MaxPool2d(3, 2))


def _inception_c(width: int, narrow: int) -> Mixed:
    horizontal, vertical = Layer(narrow, HORIZONTAL), Layer(narrow, VERTICAL)
    branches = {
        "branch1x1": [Layer(192, 1)],
        "branch7x7": [Layer(narrow, 1), horizontal, Layer(192, VERTICAL)],
        "branch7x7dbl": [Layer(narrow, 1), vertical, horizontal, vertical, Layer(192, HORIZONTAL)],
        "branch_pool": [Layer(192, 1)],
    }
    return Mixed(width, branches, _average_pool())


def _inception_d(width: int) -> Mixed:
    branches = {
        "branch3x3": [Layer(192, 1), Layer(320, 3, 2)],
        "branch7x7x3": [
            Layer(192, 1),
            Layer(192, HORIZONTAL),
            Layer(192, VERTICAL),
            Layer(192, 3, 2),
        ],
        "branch_pool": [],
    }
    return Mixed(width, branches, nn.MaxPool2d(3, 2))


def _inception_e(width: int, pool: nn.Module) -> Mixed:
    pair = Layer(384, (1, 3), second_kernel=(3, 1))
    branches = {
        "branch1x1": [Layer(320, 1)],
        "branch3x3": [Layer(384, 1), pair],
        "branch3x3dbl": [Layer(448, 1), Layer(384, 3), pair],
        "branch_pool": [Layer(192, 1)],
    }
    return Mixed(width, branches, pool)


class Inception(nn.Module):
    """The Inception v3 of 2015 that defines the FID.

    Source: Szegedy et al. 2016 (arXiv:1512.00567); as in the graph `inception-2015-12-05`:
    average pooling does not count padding, and the last block uses max pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            _inception_a(192, 32),
            _inception_a(256, 64),
            _inception_a(288, 64),
        )
        self.Mixed_6a = _inception_b(288)
        self.Mixed_6b, self.Mixed_6c = _inception_c(768, 128), _inception_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _inception_c(768, 160), _inception_c(768, 192)
        self.Mixed_7a = _inception_d(768)
        self.Mixed_7b, self.Mixed_7c = (
            _inception_e(1280, _average_pool()),
            _inception_e(2048, nn.MaxPool2d(3, 1, 1)),
        )
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 299, 299]`, from -1 to 1, to the pooled features `[n, 2048]`."""
        y = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        y = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(y, 3, 2)))
        y = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(y, 3, 2))))
        y = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(y)))
        y = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(y)))
        return self.Mixed_7c(self.Mixed_7b(y)).mean((2, 3))


def resize_bilinear(x: Tensor, side: int) -> Tensor:
    """Resize images `[..., h, w]` to `[..., side, side]`, bilinearly as TensorFlow 1 does.

    Position i comes from i * h / side, so the first pixels stay and the last ones are repeated.
    """
    for axis in (-1, -2):
        size = x.shape[axis]
        at = torch.arange(side, device=x.device) * torch.tensor(size / side, device=x.device)
        low = at.long()
        share = (at - low).view(-1, *[1] * (-1 - axis))
        first = x.index_select(axis, low)
        x = first + share * (x.index_select(axis, (low + 1).clamp(max=size - 1)) - first)
    return x
