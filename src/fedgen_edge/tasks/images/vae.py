"""A class-conditional variational autoencoder, evaluated by bits per dimension.

Source: Kingma and Welling 2014 (arXiv:1312.6114); conditional: Sohn et al. 2015.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fedgen_edge.config import Evaluation, Settings
from fedgen_edge.data.corpus import Corpus
from fedgen_edge.seeds import generator, normal, seed_global_generators
from fedgen_edge.tasks.adapted import AdaptedModel
from fedgen_edge.tasks.images import common, diffusers_io
from fedgen_edge.tasks.images.vae_network import Autoencoder
from fedgen_edge.tasks.measure import Measure
from fedgen_edge.tasks.task import Sample
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics, settle_nothing

TARGETS = ("conv1", "conv2", "by_class", "to_latent", "from_latent", "class_embedding")
"""Layers to adapt if the settings name none: all but those next to the image, which have few
channels."""
SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "tiny": ((16, 32), 1, 16),
    "small": ((16, 32, 64, 128), 1, 128),
    "large": ((128, 256, 384, 384), 3, 512),
}
"""Channels of each resolution, residual blocks in each, and the size of the latent."""
MIN_LOG_SCALE = -7.0
"""Least log-scale of a value, as in PixelCNN++: an eighth of a level."""
SCARCE_IMAGES, LOSS_SPREAD = 20, 0.3
"""Number of images from which a client can hardly learn; relative spread of an image's bits."""


def compute_bits(
    pixels: UInt8[Tensor, "*shape"], mean: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Bits of each byte under a logistic distribution discretized into 256 levels.

    The mass between two edges, s(above) - s(below) for the sigmoid s, is s(above) s(-below)
    (1 - exp(below - above)): three logarithms, none of a small difference. The lowest and the
    highest level include the entire tail beyond them.

    Args:
        pixels: from 0 to 255.
        mean: in units where -1 is 0 and 1 is 255.
        scale: the logarithm of the scale, at least NARROWEST.

    Source: Salimans et al. 2017, PixelCNN++ (arXiv:1701.05517), equation 2.
    """
    inverse_scale = (-scale.clamp(min=MIN_LOG_SCALE)).exp()
    distance = common.to_values(pixels) - mean
    below, above = (distance - 1 / 255) * inverse_scale, (distance + 1 / 255) * inverse_scale
    log_below, log_above = F.logsigmoid(above), F.logsigmoid(-below)
    log_within = log_below + log_above + torch.log(-torch.expm1(-2 / 255 * inverse_scale))
    nats = torch.where(pixels == 0, log_below, torch.where(pixels == 255, log_above, log_within))
    return -nats / math.log(2)


def compute_divergence(
    mean: Float[Tensor, "rows latent"], log_variance: Float[Tensor, "rows latent"]
) -> Float[Tensor, " rows"]:
    """KL divergence in bits of a normal distribution from the standard one.

    Args:
        mean: of the distribution.
        log_variance: its log-variance.
    """
    nats = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    return nats.sum(-1) / math.log(2)


class BitsEncoder(nn.Module):
    """An autoencoder as a function from a batch with noise to the bits of each image."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The negative evidence lower bound with the drawn latent, float32 `[rows]`."""
        dtype, label = self.model.dtype, batch["label"].long()
        values = common.to_values(batch["image"]).to(dtype)
        outputs = self.model(values, label, batch["noise"].to(dtype))
        latent_mean, log_variance, mean, scale = (part.float() for part in outputs)
        return compute_bits(batch["image"], mean, scale).sum((-3, -2, -1)) + compute_divergence(
            latent_mean, log_variance
        )


class _Decode(nn.Module):
    """The same network as a function from latents to mean images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        mean, _ = self.model.decode(batch["latent"].to(self.model.dtype), batch["label"])
        return mean.float()


@dataclass(frozen=True)
class Vae:
    """A VAE; the loss is the negative evidence lower bound in bits, and the count is of values.

    A batch holds `image`, uint8 `[*clients, batch, channels, height, width]`, `label`, `number` and
    `mask`, `[*clients, batch]`, and after `draw` also `noise`, `[*clients, batch, latent]`.
    """

    model: AdaptedModel
    module: BitsEncoder
    names: tuple[str, ...]
    """Class names, indexed by class number."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = settle_nothing

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: channels, height and width."""
        return common.get_image_shape(self.module.model.config)

    @property
    def measure(self) -> Measure:
        """Bits per dimension.

        Values of one image are correlated, so the amount of data and the precision of a mean depend
        on the number of images.
        """
        values_per_image = math.prod(self.shape)
        return Measure(
            name="bits per dimension",
            items="values",
            unit="bits a value",
            material="pictures",
            scarce_items=SCARCE_IMAGES * values_per_image,
            loss_spread=LOSS_SPREAD * math.sqrt(values_per_image),
            values_per_item=values_per_image,
        )

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Selected images with their class numbers."""
        num_classes = self.module.model.config.num_class_embeds
        return common.examples(corpus, indices, self.shape, num_classes)

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, otherwise a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, with noise for the latent of each, and a dropout seed."""
        size = (len(examples["image"]), self.module.model.config.latent)
        return {
            **examples,
            "noise": torch.randn(size, generator=rng),
            "seed": torch.randint(2**62, (), generator=rng),
        }

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed bits and the number of values."""
        del phase
        total = common.sum_client_losses(
            self.model, self.module, adapter, batch, ("image", "label", "noise")
        )
        return PerClient(total, batch["mask"].sum(-1).float() * math.prod(self.shape))

    @torch.no_grad()
    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Sums of bits and of values; the noise of each image's latent is fixed."""

        def compute_bits_per_client(part: Batch) -> PerClient:
            noise = normal(part["number"], 0, (self.module.model.config.latent,))
            return self.loss(adapter, {**part, "noise": noise}, "")

        return common.sum_over_batches(compute_bits_per_client, examples)

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Mean bits per value."""
        return {"loss": statistics["total"] / statistics["count"]}

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """A grid with a row per class; its latents are the same for every model."""
        return common.make_sample_grid(self, self.names, adapter, settings, key)

    @torch.no_grad()
    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """The mean image of a random latent for each of these classes.

        Returns:
            uint8 `[images, channels, height, width]`.
        """
        del settings
        device, decoder = self.module.model.device, _Decode(self.module.model)
        device_adapter = {k: v.to(device) for k, v in adapter.items()}

        def draw(latent: Tensor, label: Tensor) -> Tensor:
            return self.model.adapter.call(
                decoder, device_adapter, {"latent": latent, "label": label}, None
            )

        return common.generate_in_batches(
            draw, (self.module.model.config.latent,), labels, key, device
        )


def build(settings: Settings, *, full: bool, device: torch.device) -> Vae:
    """The task for these settings, with its backbone loaded and frozen.

    Args:
        settings: the run's settings.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    adapted_model = diffusers_io.load_adapted(
        "vae", Autoencoder, TARGETS, settings, full=full, device=device
    )
    adapted_model = replace(adapted_model, forward=partial(_run_short_pass, adapted_model.network))
    return Vae(adapted_model, BitsEncoder(adapted_model.network), settings.data.names)


def _run_short_pass(network: Any) -> Tensor:
    """The network's outputs for one image and one latent."""
    rng = generator("short")
    image = torch.randn(1, *common.get_image_shape(network.config), generator=rng)
    noise = torch.randn(1, network.config.latent, generator=rng)
    where = {"device": network.device, "dtype": network.dtype}
    label = torch.zeros(1, dtype=torch.long, device=network.device)
    parts = network(image.to(**where), label, noise.to(**where))
    return torch.cat([part.float().flatten() for part in parts])


def fresh(size: str, shape: tuple[int, int, int], classes: int, folder: Path) -> None:
    """Write an untrained network, identical on every machine.

    Args:
        size: one of SIZES.
        shape: the shape of an image: channels, height and width.
        classes: the number of classes.
        folder: the folder to fill.
    """
    channels, *sides = shape
    widths, depth, latent = SIZES[size]
    with seed_global_generators("vae", size):
        network = Autoencoder(
            sample_size=(sides[0], sides[1]),
            in_channels=channels,
            num_class_embeds=classes,
            block_out_channels=widths,
            layers_per_block=depth,
            latent=latent,
        )
    diffusers_io.write(network, folder, network.state_dict())
