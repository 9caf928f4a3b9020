"""A class-conditional variational autoencoder, judged by bits per dimension.

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
"""Layers to adapt where the settings name none: all but those next to the picture, which
have few channels."""
SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "tiny": ((16, 32), 1, 16),
    "small": ((16, 32, 64, 128), 1, 128),
    "large": ((128, 256, 384, 384), 3, 512),
}
"""Channels of each grid, residual blocks on each, and numbers in a latent."""
MIN_LOG_SCALE = -7.0
"""Least log-scale of a value, as PixelCNN++ has it: an eighth of a level."""
SCARCE_IMAGES, LOSS_SPREAD = 20, 0.3
"""Pictures from which a client can hardly learn; how far one's bits lie from the mean, a share."""


def compute_bits(
    pixels: UInt8[Tensor, "*shape"], mean: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Of each byte, under a logistic distribution that is cut into the 256 levels.

    The mass between two edges, s(above) - s(below) for the sigmoid s, is s(above) s(-below)
    (1 - exp(below - above)): three logarithms, none of a small difference. The least and the
    greatest level have the whole tail beyond them.

    Args:
        pixels: from 0 to 255.
        mean: where -1 is 0 and 1 is 255.
        scale: its logarithm; below NARROWEST it counts as that.

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
    """Bits from the standard normal distribution to one of this mean and log-variance."""
    nats = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    return nats.sum(-1) / math.log(2)


class BitsEncoder(nn.Module):
    """An autoencoder as a function from a drawn batch to the bits that each picture costs."""

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
    """The same network, asked for the middle of what a latent may be."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        mean, _ = self.model.decode(batch["latent"].to(self.model.dtype), batch["label"])
        return mean.float()


@dataclass(frozen=True)
class Vae:
    """The loss is a picture's bits, latent and all, by the evidence lower bound; counted in values.

    A batch holds `image`, uint8 `[*clients, batch, channels, height, width]`, `label`, `number` and
    `mask`, `[*clients, batch]`, and when drawn `noise`, `[*clients, batch, latent]`.
    """

    model: AdaptedModel
    module: BitsEncoder
    names: tuple[str, ...]
    """Of the classes, by their numbers."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = settle_nothing

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height and width."""
        return common.get_image_shape(self.module.model.config)

    @property
    def measure(self) -> Measure:
        """Bits per dimension.

        Values of one picture rise and fall together, so it is pictures that tell how much there is
        to learn from, and how well a mean is known.
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
        """Some pictures with the numbers of their classes."""
        num_classes = self.module.model.config.num_class_embeds
        return common.examples(corpus, indices, self.shape, num_classes)

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, else a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, with noise for the latent of each, and the seed of their dropout."""
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
        """Bits and values; the noise of a picture's latent is always the same."""

        def compute_bits_per_client(part: Batch) -> PerClient:
            noise = normal(part["number"], 0, (self.module.model.config.latent,))
            return self.loss(adapter, {**part, "noise": noise}, "")

        return common.sum_over_batches(compute_bits_per_client, examples)

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Mean bits of a value."""
        return {"loss": statistics["total"] / statistics["count"]}

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """A grid, a row a class; its latents are the same for every model."""
        return common.make_sample_grid(self, self.names, adapter, settings, key)

    @torch.no_grad()
    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """The middle picture of a drawn latent for each of these classes.

        Returns:
            uint8 `[pictures, channels, height, width]`.
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
    """The task of these settings, its backbone loaded and frozen.

    Args:
        settings: of the run.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    adapted_model = diffusers_io.load_adapted(
        "vae", Autoencoder, TARGETS, settings, full=full, device=device
    )
    adapted_model = replace(adapted_model, forward=partial(_run_short_pass, adapted_model.network))
    return Vae(adapted_model, BitsEncoder(adapted_model.network), settings.data.names)


def _run_short_pass(network: Any) -> Tensor:
    """What the network makes of one picture and one latent."""
    rng = generator("short")
    image = torch.randn(1, *common.get_image_shape(network.config), generator=rng)
    noise = torch.randn(1, network.config.latent, generator=rng)
    where = {"device": network.device, "dtype": network.dtype}
    label = torch.zeros(1, dtype=torch.long, device=network.device)
    parts = network(image.to(**where), label, noise.to(**where))
    return torch.cat([part.float().flatten() for part in parts])


def fresh(size: str, shape: tuple[int, int, int], classes: int, folder: Path) -> None:
    """Write an untrained network, equal on every machine.

    Args:
        size: one of SIZES.
        shape: of a picture: channels, height and width.
        classes: how many it is to know.
        folder: filled.
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
