"""Class-conditional denoising diffusion with any UNet from diffusers.

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
from fedgen_edge.seeds import generator, normal, seed_global_generators
from fedgen_edge.tasks.adapted import AdaptedModel, adapt
from fedgen_edge.tasks.images import class_text, common, diffusers_io, latents, unet
from fedgen_edge.tasks.images.latents import LatentAutoencoder
from fedgen_edge.tasks.images.samplers import denoise
from fedgen_edge.tasks.images.unet import Denoiser, Prediction
from fedgen_edge.tasks.measure import Measure
from fedgen_edge.tasks.task import Sample, make_untrained
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics, settle_nothing

MEASURE = Measure(
    name="denoising error",
    items="images",
    unit="squared error a value",
    material="pictures",
    scarce_items=20,
    loss_spread=0.5,
)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "class_embedding")
"""Layers to adapt if the settings name none."""
SIZES: dict[str, tuple[tuple[int, ...], int, set[int]]] = {
    "tiny": ((16, 32), 1, {1}),
    "small": ((16, 32, 64, 96), 1, {2, 3}),
    "large": ((128, 256, 256), 2, {1, 2}),
}
"""Channels of each resolution, residual blocks in each, and those with attention."""
NOISE_LEVELS = 4
"""Noise levels at which a held-out image is evaluated."""
GOLDEN_RATIO = 0.6180339887


@dataclass(frozen=True)
class Diffusion:
    """Diffusion; the loss is the squared error of the predicted noise, averaged over values.

    A batch holds `image`, uint8 `[*clients, batch, channels, height, width]`, or, if the network
    works on latents, `latent`, float32; `label`, `number` and `mask`, `[*clients, batch]`; and
    after `draw` also `noise`, like the image or the latent, and `step`, like the label.
    """

    model: AdaptedModel
    module: Denoiser
    noise_schedule: Any
    """The noise schedule from diffusers."""
    names: tuple[str, ...]
    """Class names, indexed by class number."""
    shape: tuple[int, int, int]
    """Shape of the clients' and the generated images: channels, height and width."""
    latents: LatentAutoencoder | None = None
    """The autoencoder between the images and the network, if any."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = settle_nothing
    measure: Measure = MEASURE

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Selected images with their class numbers; latents are computed here, once."""
        batch = common.examples(corpus, indices, self.shape, self.module.num_classes)
        if self.latents is None:
            return batch
        return {"latent": self.latents.encode(batch.pop("image"), self.module.shape), **batch}

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, otherwise a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, with noise and a noise level for each, and a dropout seed."""
        label, num_steps = examples["label"], self.module.alphas_cumprod.shape[0]
        return {
            **examples,
            "noise": torch.randn(*label.shape, *self.module.shape, generator=rng),
            "step": torch.randint(num_steps, label.shape, generator=rng, dtype=torch.int32),
            "seed": torch.randint(2**62, (), generator=rng),
        }

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed errors and the number of images."""
        del phase
        clean = batch["latent"] if self.latents else common.to_values(batch["image"])
        names = ("clean", "label", "noise", "step")
        clean_batch = {**batch, "clean": clean}
        total = common.sum_client_losses(self.model, self.module, adapter, clean_batch, names)
        return PerClient(total, batch["mask"].sum(-1).float())

    @torch.no_grad()
    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Sums of errors and of images; an image's error is a mean over fixed noise levels."""

        def compute_errors(part: Batch) -> PerClient:
            errors = [
                self.loss(adapter, {**part, **self._make_noise(part, level)}, "")
                for level in range(NOISE_LEVELS)
            ]
            mean = torch.stack([loss.total.double() for loss in errors]).sum(0) / NOISE_LEVELS
            return PerClient(mean, errors[0].count)

        return common.sum_over_batches(compute_errors, examples)

    def _make_noise(self, examples: Batch, level: int) -> Batch:
        """Noise and its level, which depend only on an image's number and cover levels evenly."""
        number = examples["number"]
        position = (number.double() * GOLDEN_RATIO + level / NOISE_LEVELS) % 1
        return {
            "noise": normal(number, level, self.module.shape),
            "step": (position * self.module.alphas_cumprod.shape[0]).int(),
        }

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Mean squared error."""
        return {"loss": statistics["total"] / statistics["count"]}

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """A grid with a row per class; its noise is the same for every model."""
        return common.make_sample_grid(self, self.names, adapter, settings, key)

    @torch.no_grad()
    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """Images of these classes, by the settings' sampler from fixed noise.

        Returns:
            uint8 `[images, channels, height, width]`.
        """
        device = self.module.alphas_cumprod.device
        device_adapter = {k: v.to(device) for k, v in adapter.items()}

        def draw(noisy: Tensor, label: Tensor) -> Tensor:
            predict = partial(self._predict, device_adapter, label)
            values = denoise(
                settings.sampler, self.noise_schedule, settings.sample_steps, noisy, predict
            )
            return self.latents.decode(values, self.shape) if self.latents else values

        return common.generate_in_batches(draw, self.module.shape, labels, key, device)

    def _predict(self, adapter: Leaves, label: Tensor, noisy: Tensor, step: int) -> Tensor:
        """The network's prediction for noisy images of these classes at a step."""
        steps = torch.full((len(label),), step, device=noisy.device)
        batch = {"noisy": noisy, "step": steps, "label": label}
        return self.model.adapter.call(Prediction(self.module), adapter, batch, None)


def build(settings: Settings, *, full: bool, device: torch.device) -> Diffusion:
    """The task for these settings, with its backbone loaded and frozen.

    In a pipeline's folder, the UNet is adapted, the autoencoder computes the latents, and the text
    encoder reads the class names.

    Args:
        settings: the run's settings.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    if settings.backbone.path == "tiny":
        settings = _use_tiny(settings)
    network, folder, digest = unet.load(settings.backbone, device)
    autoencoder = _load_autoencoder(settings, folder, device)
    noise_schedule = unet.load_schedule(settings.backbone, folder, latent=autoencoder is not None)
    text_embeddings, text_encoder_digest = _embed_classes(settings, network, folder)
    module = Denoiser(network, noise_schedule, text_embeddings).to(device)
    extra_digests = [
        d[:16] for d in (autoencoder.sha256 if autoencoder else "", text_encoder_digest) if d
    ]
    adapted = adapt(
        network,
        settings.adapter,
        TARGETS,
        full=full,
        folder=folder,
        sha256="+".join([digest, *extra_digests]),
        write=partial(unet.write, network, noise_schedule),
        weights=diffusers_io.WEIGHTS,
        part="unet" if isinstance(network, PeftAdapterMixin) else None,
        forward=partial(_run_short_pass, module),
    )
    return Diffusion(
        adapted,
        module,
        noise_schedule,
        settings.data.names,
        _get_image_shape(settings, module, autoencoder),
        autoencoder,
    )


def _run_short_pass(module: Denoiser) -> Tensor:
    """The network's prediction for one noisy image."""
    device = module.alphas_cumprod.device
    noisy = torch.randn(1, *module.shape, generator=generator("short")).to(device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return module.predict(noisy, zero, zero)


def _use_tiny(settings: Settings) -> Settings:
    """The settings with a small random network, for digits or for latents of color images."""
    side = settings.data.size or 32
    shape = (3, side, side) if settings.backbone.autoencoder else (1, 8, 8)
    folder = make_untrained("diffusion", "tiny", get_network_shape(settings.backbone, shape), 10)
    return replace(settings, backbone=replace(settings.backbone, path=str(folder)))


def get_network_shape(
    settings: Backbone, image_shape: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The network's input shape: that of latents if the settings name an autoencoder."""
    if settings.autoencoder is None:
        return image_shape
    return latents.load(settings.autoencoder, torch.device("cpu")).get_latent_shape(image_shape)


def _load_autoencoder(
    settings: Settings, folder: Path, device: torch.device
) -> LatentAutoencoder | None:
    """The autoencoder that the settings name, otherwise the pipeline's."""
    pipeline_folder = unet.find_pipeline(folder)
    pipeline_autoencoder = (
        pipeline_folder / "vae" if pipeline_folder and (pipeline_folder / "vae").is_dir() else None
    )
    autoencoder_folder = settings.backbone.autoencoder or pipeline_autoencoder
    if autoencoder_folder is None:
        unet.check_unquantized(settings.backbone, folder)
        return None
    return latents.load(autoencoder_folder, device)


def _embed_classes(settings: Settings, network: Any, folder: Path) -> tuple[Tensor | None, str]:
    """The embeddings of class names by the pipeline's text encoder, and its SHA-256."""
    pipeline_folder = unet.find_pipeline(folder)
    if pipeline_folder and unet.takes_text(network) and (pipeline_folder / "text_encoder").is_dir():
        return class_text.embed_classes(pipeline_folder, settings.data.names)
    unet.check_text_encoder(settings.backbone, network)
    return None, ""


def _get_image_shape(
    settings: Settings, module: Denoiser, autoencoder: LatentAutoencoder | None
) -> tuple[int, int, int]:
    """The images' shape: the network's, or with an autoencoder a square of `data.size`."""
    if autoencoder is None:
        return module.shape
    if autoencoder.channels != module.shape[0]:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r} works on {module.shape[0]} channels, and "
            f"the autoencoder's latents have {autoencoder.channels}: take those that "
            "belong together"
        )
    side = settings.data.size
    return (autoencoder.colors, side, side) if side else autoencoder.get_image_shape(module.shape)


def fresh(size: str, shape: tuple[int, int, int], classes: int, folder: Path) -> None:
    """Write an untrained network, identical on every machine.

    Args:
        size: one of SIZES.
        shape: the network's input shape: channels, height and width.
        classes: the number of classes.
        folder: the folder to fill.
    """
    widths, layers, attention_levels = SIZES[size]
    channels, side = shape[0], common.get_halvable_side(shape, len(widths) - 1)
    with seed_global_generators("diffusion", size):
        network = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=layers,
            norm_num_groups=8,
            attention_head_dim=8,
            num_class_embeds=classes,
            down_block_types=tuple("AttnDownBlock2D" if i in attention_levels else "DownBlock2D"
                                   for i in range(len(widths))),
            up_block_types=tuple("AttnUpBlock2D" if i in attention_levels else "UpBlock2D"
                                 for i in reversed(range(len(widths)))),
        )  # fmt: skip
    unet.write(network, DDPMScheduler(clip_sample=True), folder, network.state_dict())
