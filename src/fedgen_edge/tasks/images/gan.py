"""A class-conditional GAN: a generator, and a critic that compares it with the data, both adapted.

Source: hinge loss, Lim and Ye 2017 (arXiv:1705.02894); the gradient penalty R1, Mescheder et al.
2018 (arXiv:1801.04406); a moving average of the generator, Karras et al. 2018 (arXiv:1710.10196).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgen_edge import config
from fedgen_edge.config import Evaluation, Settings
from fedgen_edge.data.corpus import Corpus
from fedgen_edge.seeds import generator, normal
from fedgen_edge.tasks.adapted import AdaptedModel, drop_averages, update_averages, use_averages
from fedgen_edge.tasks.images import common, diffusers_io, gan_networks
from fedgen_edge.tasks.images.gan_networks import Gan
from fedgen_edge.tasks.measure import Measure
from fedgen_edge.tasks.task import Sample
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics

MEASURE = Measure(
    name="energy score",
    items="images",
    unit="distance a picture",
    material="pictures",
    scarce_items=20,
    loss_spread=0.5,
    training_loss="the generator's loss",
)
CRITIC, GENERATOR = "critic.", "generator."
TARGETS = ("label", "first", "modulate", "conv1", "conv2", "skip")
"""Layers to adapt if the settings name none."""
fresh = gan_networks.fresh
GENERATED_PER_IMAGE = 8
"""Images generated for each held-out image to evaluate them."""


class _Generate(nn.Module):
    """The generated images."""

    def __init__(self, model: Gan) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        noise = batch["noise"].to(self.model.dtype)
        return self.model(noise, batch["label"].long()).float()

    def score(self, images: Tensor, label: Tensor) -> Tensor:
        """The critic's scores, float32 `[rows]`."""
        return self.model.critic(images.to(self.model.dtype), label.long()).float()


class _GeneratorLoss(_Generate):
    """The generator's loss for each row."""

    def forward(self, batch: Batch) -> Tensor:
        return -self.score(super().forward(batch), batch["label"])


class _CriticLoss(_Generate):
    """The critic's loss for each row."""

    def __init__(self, model: Gan, penalty: float) -> None:
        super().__init__(model)
        self.penalty = penalty

    def forward(self, batch: Batch) -> Tensor:
        label = batch["label"]
        with torch.no_grad():
            generated = super().forward(batch)
        real = common.to_values(batch["image"]).requires_grad_()
        score = self.score(real, label)
        gradient = torch.autograd.grad(score.sum(), real, create_graph=True)[0]
        penalty = self.penalty / 2 * gradient.square().sum((1, 2, 3))
        return F.relu(1 - score) + F.relu(1 + self.score(generated, label)) + penalty


@dataclass(frozen=True)
class GanTask:
    """A GAN with two alternating losses: the critic's hinge with its penalty, then the generator's.

    A batch holds `image`, uint8 `[*clients, batch, channels, height, width]`, `label`, `number` and
    `mask`, `[*clients, batch]`, and after `draw` also `noise`, `[*clients, batch, size]`.

    Held-out images give the energy score, E|x - y| - E|y - y'| / 2 for an image x and generated
    ones y, y' of its class, where distances are root mean squares over values. It is proper, so it
    is lowest for the data's distribution (Gneiting and Raftery 2007), and it adds up over images.
    """

    model: AdaptedModel
    network: Gan
    names: tuple[str, ...]
    """Class names, indexed by class number."""
    settings: config.Gan
    measure: Measure = MEASURE

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The critic, then the generator."""
        s = self.settings
        return Phase(CRITIC, s.critic_steps, s.critic_rate), Phase(GENERATOR)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: channels, height and width."""
        return common.get_image_shape(self.network.config)

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Selected images with their class numbers."""
        classes = self.network.config["num_class_embeds"]
        return common.examples(corpus, indices, self.shape, classes)

    def init(self, rng: torch.Generator) -> Leaves:
        """A fresh adapter of both networks, and the generator's moving average."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: torch.Generator) -> Batch:
        """The examples, with noise for each, and a dropout seed."""
        size = (len(examples["label"]), self.network.config["noise"])
        return {
            **examples,
            "noise": torch.randn(size, generator=rng),
            "seed": torch.randint(2**62, (), generator=rng),
        }

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed losses of one of the two networks, and the number of images."""
        losses = {
            CRITIC: _CriticLoss(self.network, self.settings.r1),
            GENERATOR: _GeneratorLoss(self.network),
        }
        names = ("image", "label", "noise")
        total = common.sum_client_losses(
            self.model, losses[phase], drop_averages(adapter), batch, names
        )
        return PerClient(total, batch["mask"].sum(-1).float())

    def settle(self, adapter: Leaves) -> Leaves:
        """The generator's moving average after a batch."""
        return update_averages(adapter, self.settings.average)

    @torch.no_grad()
    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Sums of energy scores and of images; the noise for each image is fixed."""
        served_adapter = use_averages(adapter)

        def compute_scores(part: Batch) -> PerClient:
            score = torch.where(part["mask"], self._compute_energy(served_adapter, part), 0.0)
            return PerClient(score.sum(-1), part["mask"].sum(-1).float())

        return common.sum_over_batches(compute_scores, examples)

    def _compute_energy(self, adapter: Leaves, examples: Batch) -> Tensor:
        """Energy scores, `[*clients, batch]`."""
        mask = examples["mask"]
        rows = {k: examples[k].flatten(0, mask.ndim - 1) for k in ("image", "label", "number")}
        size = (self.network.config["noise"],)
        generated = [
            self._generate(adapter, normal(rows["number"], rival, size), rows["label"])
            for rival in range(GENERATED_PER_IMAGE)
        ]
        y = torch.stack(generated, 1).flatten(2)  # [rows, rivals, values]
        x = common.to_values(rows["image"]).flatten(1).unsqueeze(1)
        near, apart = torch.cdist(x, y).mean((1, 2)), torch.cdist(y, y).sum((1, 2))
        score = near - apart / (2 * GENERATED_PER_IMAGE * (GENERATED_PER_IMAGE - 1))
        return (score / y.shape[-1] ** 0.5).view_as(mask)

    def _generate(self, adapter: Leaves, noise: Tensor, label: Tensor) -> Tensor:
        rows = {"noise": noise, "label": label}
        return self.model.adapter.call(_Generate(self.network), adapter, rows, None)

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Mean energy score."""
        return {"loss": statistics["total"] / statistics["count"]}

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """A grid with a row per class; its noise is the same for every model."""
        return common.make_sample_grid(self, self.names, adapter, settings, key)

    @torch.no_grad()
    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """Images of these classes, from fixed noise, by the moving average.

        Returns:
            uint8 `[images, channels, height, width]`.
        """
        del settings
        device = next(self.network.parameters()).device
        device_adapter = {k: v.to(device) for k, v in use_averages(adapter).items()}
        draw = partial(self._generate, device_adapter)
        return common.generate_in_batches(
            draw, (self.network.config["noise"],), labels, key, device
        )


def build(settings: Settings, *, full: bool, device: torch.device) -> GanTask:
    """The task for these settings, with its backbone loaded and frozen.

    Args:
        settings: the run's settings.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    adapted_model = diffusers_io.load_adapted(
        "gan", Gan, TARGETS, settings, full=full, device=device, averaged=GENERATOR
    )
    network: Any = adapted_model.network
    adapted_model = replace(adapted_model, forward=partial(_run_short_pass, network))
    return GanTask(adapted_model, network, settings.data.names, settings.gan)


def _run_short_pass(network: Gan) -> Tensor:
    """An image generated from one noise sample, and the critic's score of it."""
    noise = torch.randn(1, network.config["noise"], generator=generator("short"))
    label = torch.zeros(1, dtype=torch.long, device=network.device)
    image = network.generator(noise.to(network.device, network.dtype), label)
    return torch.cat([image.float().flatten(), network.critic(image, label).float().flatten()])
