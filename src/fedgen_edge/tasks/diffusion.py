"""Class-conditional denoising diffusion with any UNet of diffusers'.

Source: Ho et al. 2020 (arXiv:2006.11239); sampling by DDIM, Song et al. 2021 (arXiv:2010.02502).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Generator, Tensor, nn

from fedgen_edge.config import Evaluation, Settings
from fedgen_edge.data.corpus import Corpus
from fedgen_edge.errors import ConfigError
from fedgen_edge.measure import Measure
from fedgen_edge.seeds import normal, seed
from fedgen_edge.tasks import pictures
from fedgen_edge.tasks.adapted import Adapted, adapt
from fedgen_edge.tasks.task import Sample
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
PREDICTIONS = ("epsilon", "v_prediction")
"""What a network may say of a noisy picture, as diffusers calls it."""
GOLDEN = 0.6180339887


class Denoiser(nn.Module):
    """A UNet as a function from a drawn batch to each picture's squared error."""

    kept: Tensor
    """Share of a picture's variance that is left at each step, `[steps]`."""

    def __init__(self, model: Any, kept: Tensor, predicts: str) -> None:
        super().__init__()
        self.model = model
        self.predicts = predicts
        self.register_buffer("kept", kept)

    def forward(self, batch: Batch) -> Tensor:
        """Mean over a picture's values, float32 `[rows]`."""
        picture, noise = pictures.values(batch["image"]), batch["noise"]
        kept = self.kept[batch["step"].long()].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * picture + (1 - kept).sqrt() * noise
        told = self.predict(noisy, batch["step"], batch["label"])
        if self.predicts == "v_prediction":
            noise = kept.sqrt() * noise - (1 - kept).sqrt() * picture
        return (told - noise).square().mean((-3, -2, -1))

    def predict(self, noisy: Tensor, step: Tensor, label: Tensor) -> Tensor:
        """What the network says of noisy pictures, in float32."""
        kind = next(self.model.parameters()).dtype
        return self.model(noisy.to(kind), step.long(), class_labels=label.long()).sample.float()


class _Predict(nn.Module):
    """The same network, asked for its prediction alone."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.model, self.ask = denoiser.model, denoiser.predict

    def forward(self, batch: Batch) -> Tensor:
        return self.ask(batch["noisy"], batch["step"], batch["label"])


@dataclass(frozen=True)
class Diffusion:
    """The loss is the squared error of the predicted noise, a mean over each picture's values.

    A batch holds `image`, uint8 `[*clients, batch, channels, height, width]`, `label`, `number` and
    `mask`, `[*clients, batch]`, and when drawn `noise`, like the image, and `step`, like the label.
    """

    model: Adapted
    module: Denoiser
    noising: Any
    """diffusers' schedule of noise."""
    names: tuple[str, ...]
    """Of the classes, by their numbers."""
    phases: tuple[Phase, ...] = (Phase(),)
    settle: Callable[[Leaves], Leaves] = none_follow
    measure: Measure = MEASURE

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height and width."""
        return pictures.shape(self.module.model.config)

    @property
    def classes(self) -> int:
        """How many the backbone knows."""
        told: Any = self.module.model.config
        return told.num_class_embeds or 1

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Some pictures with the numbers of their classes."""
        return pictures.examples(corpus, indices, self.shape, self.classes)

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, else a fresh one."""
        return self.model.init(rng)

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """The examples, with noise and its amount for each, and the seed of their dropout."""
        picture, most = examples["image"], self.module.kept.shape[0]
        return {
            **examples,
            "noise": torch.randn(picture.shape, generator=rng),
            "step": torch.randint(most, picture.shape[:1], generator=rng, dtype=torch.int32),
            "seed": torch.randint(2**62, (), generator=rng),
        }

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed errors and the number of pictures."""
        del phase
        names = ("image", "label", "noise", "step")
        total = pictures.summed(self.model, self.module, adapter, batch, names)
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
            "noise": normal(number, level, tuple(examples["image"].shape[-3:])),
            "step": (place * self.module.kept.shape[0]).int(),
        }

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Mean squared error."""
        return {"loss": statistics["total"] / statistics["count"]}

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """A grid, a row a class; its noise is the same for every model."""
        draw = partial(self.generate, adapter, key=key, settings=settings)
        yield from pictures.samples(draw, self.names, settings)

    @torch.no_grad()
    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """Pictures of these classes, by DDIM from fixed noise.

        Returns:
            uint8 `[pictures, channels, height, width]`.
        """
        device = self.module.kept.device
        own = {k: v.to(device) for k, v in adapter.items()}
        start = pictures.noise(self.shape, key, len(labels)).to(device)
        asked = torch.tensor(labels, device=device)
        made = [
            self._denoised(own, *part, settings.sample_steps)
            for part in zip(start.split(pictures.MOST), asked.split(pictures.MOST), strict=True)
        ]
        return torch.cat([pictures.pixels(part).cpu() for part in made])

    def _denoised(self, adapter: Leaves, noisy: Tensor, labels: Tensor, steps: int) -> Tensor:
        walk: Any = DDIMScheduler.from_config(self.noising.config)
        walk.set_timesteps(min(steps, self.module.kept.shape[0]))
        asks = _Predict(self.module)
        for step in walk.timesteps:
            here = torch.full((len(labels),), int(step), device=noisy.device)
            told = self.model.adapter.call(
                asks, adapter, {"noisy": noisy, "step": here, "label": labels}, None
            )
            noisy = walk.step(told, step, noisy, eta=0.0).prev_sample
        return noisy


def build(settings: Settings, *, full: bool, device: torch.device) -> Diffusion:
    """The task of these settings, its backbone loaded and frozen.

    Args:
        settings: of the run.
        full: train every weight instead of an adapter.
        device: where the backbone goes.
    """
    chosen = pictures.chosen(settings.backbone, "diffusion")
    network, folder, digest = pictures.network(chosen, UNet2DModel, device)
    noising = schedule(folder)
    if (target := noising.config["prediction_type"]) not in PREDICTIONS:
        raise ConfigError(
            f"backbone.path={settings.backbone.path!r} predicts {target!r}: take one that predicts "
            f"{' or '.join(PREDICTIONS)}"
        )
    module = Denoiser(network, noising.alphas_cumprod.clone(), noising.config["prediction_type"])
    adapted = adapt(
        network,
        settings.adapter,
        TARGETS,
        full=full,
        folder=folder,
        sha256=digest,
        write=partial(write, network, noising),
        weights=pictures.WEIGHTS,
    )
    return Diffusion(adapted, module.to(device), noising, settings.data.names)


def schedule(folder: Path) -> Any:
    """How noise is added: what stands beside the network, else the paper's 1,000 linear steps."""
    for place in (folder, folder.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return DDPMScheduler.from_pretrained(place)
    return DDPMScheduler()


def write(network: Any, noising: Any, folder: Path, weights: Leaves) -> None:
    """A folder that diffusers loads, its schedule beside it."""
    noising.save_config(folder)
    pictures.write(network, folder, weights)


def fresh(size: str, shape: tuple[int, int, int], classes: int, folder: Path) -> None:
    """Write an untrained network, equal on every machine.

    Args:
        size: one of SIZES.
        shape: of a picture: channels, height and width.
        classes: how many it is to know.
        folder: filled.
    """
    channels, side, _ = shape
    widths, layers, attended = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed("diffusion", size))
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
    write(network, DDPMScheduler(clip_sample=True), folder, network.state_dict())
