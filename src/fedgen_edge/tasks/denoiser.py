"""diffusers' UNets as functions from noisy pictures to what is noise in them; their folders."""

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
from fedgen_edge.tasks import folders, pictures
from fedgen_edge.types import Batch, Leaves

KINDS: dict[str, Any] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
}
PREDICTIONS = ("epsilon", "v_prediction")
"""What a network may say of a noisy picture, as diffusers calls it."""
UNKNOWN = ("class_embed_type", "addition_embed_type", "encoder_hid_dim")
"""Settings of a UNet that ask for more than a class's number or its words."""


class Denoiser(nn.Module):
    """A UNet as a function from a drawn batch to each picture's squared error."""

    kept: Tensor
    """Share of a picture's variance that is left at each step, `[steps]`."""
    words: Tensor | None
    """What the network is told of each class, `[classes, tokens, width]`."""

    def __init__(self, model: Any, noising: Any, words: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.predicts = noising.config["prediction_type"]
        self.register_buffer("kept", noising.alphas_cumprod.clone())
        self.register_buffer("words", words)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what it denoises: channels, height and width."""
        return pictures.shape(self.model.config)

    @property
    def classes(self) -> int:
        """How many it tells apart; one that is unconditional knows one."""
        numbered = self.model.config.num_class_embeds
        return numbered or (1 if self.words is None else len(self.words))

    def forward(self, batch: Batch) -> Tensor:
        """Mean over a picture's values, float32 `[rows]`; `clean` is the picture's."""
        clean, noise = batch["clean"], batch["noise"]
        kept = self.kept[batch["step"].long()].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        told = self.predict(noisy, batch["step"], batch["label"])
        if self.predicts == "v_prediction":
            noise = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        return (told - noise).square().mean((-3, -2, -1))

    def predict(self, noisy: Tensor, step: Tensor, label: Tensor) -> Tensor:
        """What the network says of noisy pictures, in float32.

        Of a network that learns its variance too, the first half of the channels, which is all that
        L_simple sees (Nichol & Dhariwal 2021, arXiv:2102.09672).
        """
        kind = next(self.model.parameters()).dtype
        told: dict[str, Tensor] = {}
        if self.model.config.num_class_embeds:
            told["class_labels"] = label.long()
        if reads(self.model):
            told["encoder_hidden_states"] = self._read(label).to(kind)
        said = self.model(noisy.to(kind), step.long(), **told).sample
        return said[:, : noisy.shape[1]].float()

    def _read(self, label: Tensor) -> Tensor:
        """Each class's words; one token of zeros where the network knows numbers alone."""
        if self.words is not None:
            return self.words[label.long()]
        return torch.zeros(
            len(label), 1, self.model.config.cross_attention_dim, device=label.device
        )


class Predict(nn.Module):
    """The same network, asked for its prediction alone."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.model, self.ask = denoiser.model, denoiser.predict

    def forward(self, batch: Batch) -> Tensor:
        """Of `noisy` at `step`, for `label`."""
        return self.ask(batch["noisy"], batch["step"], batch["label"])


def load(settings: Backbone, device: torch.device) -> tuple[Any, Path, str]:
    """A UNet, the folder that it came from, and the SHA-256 of its weights.

    Raises:
        ConfigError: there is none, or it is one that no class alone can condition.
    """
    config = folders.place(settings) / "config.json"
    try:
        name = json.loads(config.read_text())["_class_name"] if config.is_file() else "UNet2DModel"
    except (ValueError, KeyError, TypeError):
        raise _fault(settings, "has a config.json that names no network: take another") from None
    if name not in KINDS:
        raise _fault(settings, f"is no {' or '.join(KINDS)} (it holds {name}): take another")
    network, folder, digest = folders.network(settings, KINDS[name], device)
    _check(settings, network.config)
    return network, folder, digest


def _check(settings: Backbone, told: Any) -> None:
    if odd := [key for key in UNKNOWN if told.get(key) is not None]:
        raise _fault(
            settings, f"is conditioned by {odd[0]}={told[odd[0]]!r}, not by a class's number or "
            "words: take one without it"
        )  # fmt: skip
    if told["sample_size"] is None:
        raise _fault(settings, "does not say its sample_size: write it into its config.json")
    if told["out_channels"] not in {told["in_channels"], 2 * told["in_channels"]}:
        raise _fault(
            settings, f"makes {told['out_channels']} channels of {told['in_channels']}: take one "
            "that makes as many, or twice as many where it learns its variance"
        )  # fmt: skip


def reads(network: Any) -> bool:
    """Whether a network takes words."""
    return isinstance(network, UNet2DConditionModel)


def unread(settings: Backbone, network: Any) -> None:
    """Refuse a network that needs words where there is nothing that reads a class's name."""
    told = network.config
    if reads(network) and not (
        told["num_class_embeds"] and isinstance(told["cross_attention_dim"], int)
    ):
        raise _fault(
            settings, "is conditioned by text, and no text_encoder is beside it: give the whole "
            "pipeline's folder"
        )  # fmt: skip


def quantised(settings: Backbone, folder: Path) -> None:
    """Refuse a pipeline's UNet whose latents are a codebook's: they would pass for pictures."""
    for name in ("vqvae", "movq"):
        if (folder.parent / name).is_dir():
            raise _fault(
                settings, f"works on the latents of its {name}, which is not read: take a pipeline "
                "with a vae, or give backbone.autoencoder"
            )  # fmt: skip


def _fault(settings: Backbone, what: str) -> ConfigError:
    return ConfigError(f"backbone.path={settings.path!r} {what}")


def pipeline(folder: Path) -> Path | None:
    """The pipeline whose UNet lies in a folder, if it is one's."""
    return folder.parent if (folder.parent / "model_index.json").is_file() else None


def schedule(settings: Backbone, folder: Path, *, latent: bool) -> Any:
    """How noise is added: what stands beside the network, else the paper's 1,000 linear steps.

    Args:
        settings: whose path an error names.
        folder: of the network.
        latent: the network works on latents: they have no bounds, so that none are cut off.
    """
    places = [p for p in (folder, folder.parent / "scheduler")
              if (p / "scheduler_config.json").is_file()]  # fmt: skip
    found: Any = DDPMScheduler.from_pretrained(places[0]) if places else DDPMScheduler()
    if (target := found.config["prediction_type"]) not in PREDICTIONS:
        raise _fault(
            settings, f"predicts {target!r}: take one that predicts {' or '.join(PREDICTIONS)}"
        )
    return DDPMScheduler.from_config(found.config, clip_sample=False) if latent else found


def write(network: Any, noising: Any, folder: Path, weights: Leaves) -> None:
    """A folder that diffusers loads, its schedule beside it."""
    noising.save_config(folder)
    folders.write(network, folder, weights)
