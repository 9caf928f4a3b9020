"""Class-conditional denoising diffusion with any UNet of diffusers'.

Source: Ho et al. 2020 (arXiv:2006.11239); on latents, Rombach et al. 2022 (arXiv:2112.10752).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Generator, Tensor

from fedgen_edge.config import Backbone, Evaluation, Settings
from fedgen_edge.data.corpus import Corpus
from fedgen_edge.errors import ConfigError
from fedgen_edge.measure import Measure
from fedgen_edge.seeds import generator, normal, seeded
from fedgen_edge.tasks import denoiser, folders, latents, pictures, words
from fedgen_edge.tasks.adapted import Adapted, adapt
from fedgen_edge.tasks.denoiser import Denoiser, Predict
from fedgen_edge.tasks.latents import Autoencoder
from fedgen_edge.tasks.samplers import walk
from fedgen_edge.tasks.task import Sample, untrained
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics, none_follow

MEASURE = Measure(
    name="denoising error",
    items="images",
    unit="squared error a value",
    material="pictures",
    few=20,
    spread=0.5,
)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "class_embedding")
"""Layers to adapt where the settings name none."""
SIZES: dict[str, tuple[tuple[int, ...], int, set[int]]] = {
    "tiny": ((16, 32), 1, {1}),
    "small": ((16, 32, 64, 96), 1, {2, 3}),
    "large": ((128, 256, 256), 2, {1, 2}),
}
"""Channels of each resolution, residual blocks in each, and those with attention."""
LEVELS = 4
"""Amounts of noise at which a held-out picture is judged."""
GOLDEN = 0.6180339887


@dataclass(frozen=True)
class Diffusion:
    """The loss is the squared error of the predicted noise, a mean over each picture's values.

    A batch holds `image`, uint8 `[*clients, batch, channels, height, width]`, or where the network
    works on latents `latent`, float32; `label`, `number` and `mask`, `[*clients, batch]`; and when
    drawn `noise`, like the image or the latent, and `step`, like the label.
    """

    model: Adapted
    module: Denoiser
    noising: Any
    """diffusers' schedule of noise."""
    names: tuple[str, ...]
    """Of the classes, by their numbers."""
    shape: tuple[int, int, int]
    """Of the pictures that clients hold and that are made: channels, height and width."""
    latents: Autoencoder | None = None
    """Between the pictures and the network."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = none_follow
    measure: Measure = MEASURE

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Some pictures with the numbers of their classes; their latents are made here, once."""
        held = pictures.examples(corpus, indices, self.shape, self.module.classes)
        if self.latents is None:
            return held
        return {"latent": self.latents.encode(held.pop("image"), self.module.shape), **held}

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, else a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, with noise and its amount for each, and the seed of their dropout."""
        label, most = examples["label"], self.module.kept.shape[0]
        return {
            **examples,
            "noise": torch.randn(*label.shape, *self.module.shape, generator=rng),
            "step": torch.randint(most, label.shape, generator=rng, dtype=torch.int32),
            "seed": torch.randint(2**62, (), generator=rng),
        }

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed errors and the number of pictures."""
        del phase
        clean = batch["latent"] if self.latents else pictures.values(batch["image"])
        names = ("clean", "label", "noise", "step")
        own = {**batch, "clean": clean}
        total = pictures.summed(self.model, self.module, adapter, own, names)
        return PerClient(total, batch["mask"].sum(-1).float())

    @torch.no_grad()
    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Errors and pictures; each picture's is a mean over amounts of noise, always the same."""

        def judge(part: Batch) -> PerClient:
            each = [
                self.loss(adapter, {**part, **self._held_out(part, level)}, "")
                for level in range(LEVELS)
            ]
            mean = torch.stack([loss.total.double() for loss in each]).sum(0) / LEVELS
            return PerClient(mean, each[0].count)

        return pictures.added(judge, examples)

    def _held_out(self, examples: Batch, level: int) -> Batch:
        """Noise and its amount, which go by a picture's number alone, spread evenly over both."""
        number = examples["number"]
        place = (number.double() * GOLDEN + level / LEVELS) % 1
        return {
            "noise": normal(number, level, self.module.shape),
            "step": (place * self.module.kept.shape[0]).int(),
        }

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Mean squared error."""
        return {"loss": statistics["total"] / statistics["count"]}

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """A grid, a row a class; its noise is the same for every model."""
        return pictures.samples(self, self.names, adapter, settings, key)

    @torch.no_grad()
    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """Pictures of these classes, by the settings' sampler from fixed noise.

        Returns:
            uint8 `[pictures, channels, height, width]`.
        """
        device = self.module.kept.device
        own = {k: v.to(device) for k, v in adapter.items()}

        def draw(noisy: Tensor, label: Tensor) -> Tensor:
            ask = partial(self._told, own, label)
            values = walk(settings.sampler, self.noising, settings.sample_steps, noisy, ask)
            return self.latents.decode(values, self.shape) if self.latents else values

        return pictures.made(draw, self.module.shape, labels, key, device)

    def _told(self, adapter: Leaves, label: Tensor, noisy: Tensor, step: int) -> Tensor:
        """What the network says of noisy pictures of these classes at a step."""
        steps = torch.full((len(label),), step, device=noisy.device)
        batch = {"noisy": noisy, "step": steps, "label": label}
        return self.model.adapter.call(Predict(self.module), adapter, batch, None)


def build(settings: Settings, *, full: bool, device: torch.device) -> Diffusion:
    """The task of these settings, its backbone loaded and frozen.

    Of a pipeline's folder, the UNet is adapted; its autoencoder makes the latents, and its text
    encoder reads the classes' names.

    Args:
        settings: of the run.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    if settings.backbone.path == "tiny":
        settings = _tiny(settings)
    network, folder, digest = denoiser.load(settings.backbone, device)
    between = _autoencoder(settings, folder, device)
    noising = denoiser.schedule(settings.backbone, folder, latent=between is not None)
    told, reader = _words(settings, network, folder)
    module = Denoiser(network, noising, told).to(device)
    beside = [d[:16] for d in (between.sha256 if between else "", reader) if d]
    adapted = adapt(
        network,
        settings.adapter,
        TARGETS,
        full=full,
        folder=folder,
        sha256="+".join([digest, *beside]),
        write=partial(denoiser.write, network, noising),
        weights=folders.WEIGHTS,
        part="unet" if isinstance(network, PeftAdapterMixin) else None,
        forward=partial(_short_pass, module),
    )
    return Diffusion(
        adapted, module, noising, settings.data.names, _picture(settings, module, between), between
    )


def _short_pass(module: Denoiser) -> Tensor:
    """What the network says of one noisy picture."""
    device = module.kept.device
    noisy = torch.randn(1, *module.shape, generator=generator("short")).to(device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return module.predict(noisy, zero, zero)


def _tiny(settings: Settings) -> Settings:
    """The same with a small random network: of digits, or of the latents of colour pictures."""
    side = settings.data.size or 32
    shape = (3, side, side) if settings.backbone.autoencoder else (1, 8, 8)
    folder = untrained("diffusion", "tiny", worked_on(settings.backbone, shape), 10)
    return replace(settings, backbone=replace(settings.backbone, path=str(folder)))


def worked_on(settings: Backbone, picture: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape of what a network works on: of latents where the settings name an autoencoder."""
    if settings.autoencoder is None:
        return picture
    return latents.load(settings.autoencoder, torch.device("cpu")).shape(picture)


def _autoencoder(settings: Settings, folder: Path, device: torch.device) -> Autoencoder | None:
    """The one that the settings name, else that of the pipeline."""
    whole = denoiser.pipeline(folder)
    own = whole / "vae" if whole and (whole / "vae").is_dir() else None
    where = settings.backbone.autoencoder or own
    if where is None:
        denoiser.quantised(settings.backbone, folder)
        return None
    return latents.load(where, device)


def _words(settings: Settings, network: Any, folder: Path) -> tuple[Tensor | None, str]:
    """What the pipeline's text encoder makes of each class's name, and its SHA-256."""
    whole = denoiser.pipeline(folder)
    if whole and denoiser.reads(network) and (whole / "text_encoder").is_dir():
        return words.embed(whole, settings.data.names)
    denoiser.unread(settings.backbone, network)
    return None, ""


def _picture(
    settings: Settings, module: Denoiser, between: Autoencoder | None
) -> tuple[int, int, int]:
    """The shape of the pictures: the network's own; or a square of data.size, if one is between."""
    if between is None:
        return module.shape
    if between.channels != module.shape[0]:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r} works on {module.shape[0]} channels, and "
            f"the autoencoder's latents have {between.channels}: take those that belong together"
        )
    side = settings.data.size
    return (between.colours, side, side) if side else between.picture(module.shape)


def fresh(size: str, shape: tuple[int, int, int], classes: int, folder: Path) -> None:
    """Write an untrained network, equal on every machine.

    Args:
        size: one of SIZES.
        shape: of what it works on: channels, height and width.
        classes: how many it is to know.
        folder: filled.
    """
    widths, layers, attended = SIZES[size]
    channels, side = shape[0], pictures.halved(shape, len(widths) - 1)
    with seeded("diffusion", size):
        network = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=layers,
            norm_num_groups=8,
            attention_head_dim=8,
            num_class_embeds=classes,
            down_block_types=tuple("AttnDownBlock2D" if i in attended else "DownBlock2D"
                                   for i in range(len(widths))),
            up_block_types=tuple("AttnUpBlock2D" if i in attended else "UpBlock2D"
                                 for i in reversed(range(len(widths)))),
        )  # fmt: skip
    denoiser.write(network, DDPMScheduler(clip_sample=True), folder, network.state_dict())
