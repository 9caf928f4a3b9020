"""UNets from diffusers as functions that predict the noise in images, and their folders."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from fedgen_edge.config import Backbone
from fedgen_edge.errors import ConfigError
from fedgen_edge.tasks.images import common, diffusers_io
from fedgen_edge.types import Batch, Leaves

KINDS: dict[str, Any] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
}
PREDICTIONS = ("epsilon", "v_prediction")
"""What a network may predict for a noisy image, by diffusers' names."""
UNSUPPORTED = ("class_embed_type", "addition_embed_type", "encoder_hid_dim")
"""Settings of a UNet that require inputs beyond a class's number or its words."""


class Denoiser(nn.Module):
    """A UNet as a function from a batch with noise to each image's squared error."""

    alphas_cumprod: Tensor
    """Fraction of an image's variance that remains at each step, `[steps]`."""
    text_embeddings: Tensor | None
    """Text embeddings of each class, `[classes, tokens, width]`."""

    def __init__(self, model: Any, noise_schedule: Any, text_embeddings: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.prediction_type = noise_schedule.config["prediction_type"]
        self.register_buffer("alphas_cumprod", noise_schedule.alphas_cumprod.clone())
        self.register_buffer("text_embeddings", text_embeddings)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The network's input shape: channels, height and width."""
        return common.get_image_shape(self.model.config)

    @property
    def num_classes(self) -> int:
        """The number of classes; one for an unconditional network."""
        num_classes = self.model.config.num_class_embeds
        return num_classes or (1 if self.text_embeddings is None else len(self.text_embeddings))

    def forward(self, batch: Batch) -> Tensor:
        """Mean squared error over an image's values, float32 `[rows]`; `clean` is the image."""
        clean, noise = batch["clean"], batch["noise"]
        signal = self.alphas_cumprod[batch["step"].long()].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        prediction = self.predict(noisy, batch["step"], batch["label"])
        if self.prediction_type == "v_prediction":
            noise = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        return (prediction - noise).square().mean((-3, -2, -1))

    def predict(self, noisy: Tensor, step: Tensor, label: Tensor) -> Tensor:
        """The network's prediction for noisy images, in float32.

        If the network also learns its variance, this is the first half of the channels, the only
        part in L_simple (Nichol & Dhariwal 2021, arXiv:2102.09672).
        """
        dtype = next(self.model.parameters()).dtype
        conditions: dict[str, Tensor] = {}
        if self.model.config.num_class_embeds:
            conditions["class_labels"] = label.long()
        if takes_text(self.model):
            conditions["encoder_hidden_states"] = self._get_text_embeddings(label).to(dtype)
        output = self.model(noisy.to(dtype), step.long(), **conditions).sample
        return output[:, : noisy.shape[1]].float()

    def _get_text_embeddings(self, label: Tensor) -> Tensor:
        """Each class's text embedding; one token of zeros if there is no text encoder."""
        if self.text_embeddings is not None:
            return self.text_embeddings[label.long()]
        return torch.zeros(
            len(label), 1, self.model.config.cross_attention_dim, device=label.device
        )


class Prediction(nn.Module):
    """A module that returns only the network's prediction."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.model, self.predict = denoiser.model, denoiser.predict

    def forward(self, batch: Batch) -> Tensor:
        """The prediction for `noisy` at `step`, given `label`."""
        return self.predict(batch["noisy"], batch["step"], batch["label"])


def load(settings: Backbone, device: torch.device) -> tuple[Any, Path, str]:
    """A UNet, its folder, and the SHA-256 of its weights.

    Raises:
        ConfigError: there is none, or it needs conditions beyond a class.
    """
    config = diffusers_io.find_network_folder(settings) / "config.json"
    try:
        name = json.loads(config.read_text())["_class_name"] if config.is_file() else "UNet2DModel"
    except (ValueError, KeyError, TypeError):
        raise _make_error(
            settings, "has a config.json that names no network: take another"
        ) from None
    if name not in KINDS:
        raise _make_error(settings, f"is no {' or '.join(KINDS)} (it holds {name}): take another")
    network, folder, digest = diffusers_io.load_network(settings, KINDS[name], device)
    _check_config(settings, network.config)
    return network, folder, digest


def _check_config(settings: Backbone, config: Any) -> None:
    if odd := [key for key in UNSUPPORTED if config.get(key) is not None]:
        raise _make_error(
            settings, f"is conditioned by {odd[0]}={config[odd[0]]!r}, not by a class's number or "
            "words: take one without it"
        )  # fmt: skip
    if config["sample_size"] is None:
        raise _make_error(settings, "does not say its sample_size: write it into its config.json")
    if config["out_channels"] not in {config["in_channels"], 2 * config["in_channels"]}:
        raise _make_error(
            settings, f"makes {config['out_channels']} channels of "
            f"{config['in_channels']}: take one "
            "that makes as many, or twice as many where it learns its variance"
        )  # fmt: skip


def takes_text(network: Any) -> bool:
    """Whether a network is conditioned on text embeddings."""
    return isinstance(network, UNet2DConditionModel)


def check_text_encoder(settings: Backbone, network: Any) -> None:
    """Refuse a network that needs text embeddings if no text encoder is there."""
    config = network.config
    if takes_text(network) and not (
        config["num_class_embeds"] and isinstance(config["cross_attention_dim"], int)
    ):
        raise _make_error(
            settings, "is conditioned by text, and no text_encoder is beside it: give the whole "
            "pipeline's folder"
        )  # fmt: skip


def check_unquantized(settings: Backbone, folder: Path) -> None:
    """Refuse a pipeline's UNet on codebook latents, which would be mistaken for images."""
    for name in ("vqvae", "movq"):
        if (folder.parent / name).is_dir():
            raise _make_error(
                settings, f"works on the latents of its {name}, which is not read: take a pipeline "
                "with a vae, or give backbone.autoencoder"
            )  # fmt: skip


def _make_error(settings: Backbone, problem: str) -> ConfigError:
    return ConfigError(f"backbone.path={settings.path!r} {problem}")


def find_pipeline(folder: Path) -> Path | None:
    """The folder of the pipeline that a UNet's folder belongs to; None if there is none."""
    return folder.parent if (folder.parent / "model_index.json").is_file() else None


def load_schedule(settings: Backbone, folder: Path, *, latent: bool) -> Any:
    """The noise schedule saved beside the network, otherwise the paper's 1,000 linear steps.

    Args:
        settings: the backbone's settings, for error messages.
        folder: the network's folder.
        latent: whether the network works on latents, which are unbounded and so never clipped.
    """
    folders_found = [p for p in (folder, folder.parent / "scheduler")
              if (p / "scheduler_config.json").is_file()]  # fmt: skip
    scheduler: Any = (
        DDPMScheduler.from_pretrained(folders_found[0]) if folders_found else DDPMScheduler()
    )
    if (target := scheduler.config["prediction_type"]) not in PREDICTIONS:
        raise _make_error(
            settings, f"predicts {target!r}: take one that predicts {' or '.join(PREDICTIONS)}"
        )
    return DDPMScheduler.from_config(scheduler.config, clip_sample=False) if latent else scheduler


def write(network: Any, noise_schedule: Any, folder: Path, weights: Leaves) -> None:
    """Write a folder that diffusers loads, including the noise schedule."""
    noise_schedule.save_config(folder)
    diffusers_io.write(network, folder, weights)
