"""Code shared by image tasks: examples, sums of losses, grids of samples."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fedgen_edge.config import Evaluation
from fedgen_edge.data.batches import split_rows
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.adapted import AdaptedModel
from fedgen_edge.tasks.task import ImageTask, Sample
from fedgen_edge.types import Batch, Leaves, PerClient, Statistics

MAX_IMAGES_PER_PASS = 64
"""Images in one forward pass of evaluation or sampling."""
MIN_VISIBLE_SIDE = 512
"""Minimum pixels of the longer side of an image file."""


def examples(corpus: Corpus, indices: Sequence[int], shape: tuple[int, ...], classes: int) -> Batch:
    """Selected images with the numbers of their classes and of the images themselves.

    Args:
        corpus: a corpus of images.
        indices: the images to select.
        shape: the shape of the backbone's images, `(channels, height, width)`.
        classes: the number of classes of the backbone.

    Raises:
        ConfigError: the data are not images, or do not fit this backbone.
    """
    images, labels = corpus.examples, corpus.labels
    if not isinstance(images, Images) or labels is None:
        raise ConfigError(
            "this task makes pictures, and the data are text: set data.source, or task='language'"
        )
    if (data_shape := tuple(images.pixels.shape[1:])) != shape:
        descriptions = [
            f"{width} x {height} with {channels} channels"
            for channels, height, width in (data_shape, shape)
        ]
        raise ConfigError(
            f"the pictures are {descriptions[0]}, and backbone.path makes "
            f"{descriptions[1]}: set data.size or "
            "backbone.autoencoder, or take another backbone"
        )
    if len(images.classes) > classes:
        raise ConfigError(
            f"the data have {len(images.classes)} classes, and backbone.path knows {classes}: keep "
            "fewer by data.names, or take a backbone that is conditioned on classes"
        )
    numbers = {name: number for number, name in enumerate(images.classes)}
    chosen = list(indices)
    return {
        "image": images.pixels[chosen],
        "label": torch.tensor([numbers[labels[i]] for i in chosen], dtype=torch.int32),
        "number": torch.tensor(chosen, dtype=torch.int32),
        "mask": torch.ones(len(chosen), dtype=torch.bool),
    }


def get_image_shape(config: Any) -> tuple[int, int, int]:
    """The shape of a network's images by its configuration: channels, height and width."""
    side = config.sample_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return config.in_channels, height, width


def get_halvable_side(shape: tuple[int, int, int], num_halvings: int) -> int:
    """The side of square images that a network halves a given number of times.

    Raises:
        ConfigError: they are not square, or cannot be halved that often.
    """
    _, height, width = shape
    if height != width or height % 2**num_halvings:
        raise ConfigError(
            f"this task's network halves what it works on {num_halvings} times, and "
            f"that is {width} x "
            f"{height}: set data.size to a multiple of {2**num_halvings}, or pretrain.size='tiny'"
        )
    return height


def sum_client_losses(
    model: AdaptedModel, module: nn.Module, adapter: Leaves, batch: Batch, names: Sequence[str]
) -> Tensor:
    """Each client's summed loss over its unmasked images, `[*clients]`.

    Args:
        model: the model that computes with the adapter.
        module: maps fields of a batch, `[rows, ...]`, to losses, `[rows]`.
        adapter: one client's leaves, or a stack.
        batch: a batch from `draw`.
        names: the fields that the module needs.
    """
    mask = batch["mask"]
    rows = {k: batch[k].flatten(0, mask.ndim - 1) for k in names}
    losses = model.adapter.call(module, adapter, rows, batch.get("seed"))
    return torch.where(mask, losses.view_as(mask), 0.0).sum(-1)


def sum_over_batches(compute_loss: Callable[[Batch], PerClient], examples: Batch) -> Statistics:
    """Sums and counts over held-out examples, float64 `[*clients]` each, in small batches.

    Args:
        compute_loss: computes the loss of a batch.
        examples: `[*clients, batch, ...]` each.
    """
    clients = examples["mask"].shape[:-1]
    sums = {k: torch.zeros(clients, dtype=torch.float64) for k in ("total", "count")}
    for part in split_rows(examples, len(clients), max(1, MAX_IMAGES_PER_PASS // clients.numel())):
        loss = compute_loss(part)
        sums["total"] += loss.total.double().cpu()
        sums["count"] += loss.count.double().cpu()
    return sums


def to_values(pixels: Tensor) -> Tensor:
    """Values from -1 to 1 for bytes."""
    return pixels.float() / 127.5 - 1


def to_pixels(values: Tensor) -> Tensor:
    """Bytes for values from -1 to 1; values outside are clamped."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def draw_noise(shape: tuple[int, ...], key: int, count: int) -> Tensor:
    """The initial noise of each sample, the same for every model and every number of samples."""
    rngs = (generator(key, "sample", at) for at in range(count))
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def generate_in_batches(
    draw: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    labels: Sequence[int],
    key: int,
    device: torch.device,
) -> Tensor:
    """Images of these classes, generated in small batches, each from noise fixed by its position.

    Args:
        draw: maps noise and classes to values from -1 to 1.
        shape: the shape of one image's noise.
        labels: the numbers of the classes.
        key: seed of the noise.
        device: where the images are generated.

    Returns:
        uint8 `[images, channels, height, width]`.
    """
    noise_batch = draw_noise(shape, key, len(labels)).to(device)
    label_tensor = torch.tensor(labels, device=device)
    pairs = zip(
        noise_batch.split(MAX_IMAGES_PER_PASS), label_tensor.split(MAX_IMAGES_PER_PASS), strict=True
    )
    return torch.cat([to_pixels(draw(*few)).cpu() for few in pairs])


def make_grid(images: Tensor, columns: int) -> Tensor:
    """Images side by side, two pixels apart.

    Args:
        images: uint8 `[images, channels, height, width]`.
        columns: images per row.
    """
    count, channels, height, width = images.shape
    lines = -(-count // columns)
    sheet = images.new_full((channels, lines * (height + 2) - 2, columns * (width + 2) - 2), 255)
    for at, image in enumerate(images):
        y, x = (at // columns) * (height + 2), (at % columns) * (width + 2)
        sheet[:, y : y + height, x : x + width] = image
    return sheet


def make_sample_grid(
    task: ImageTask, names: Sequence[str], adapter: Leaves, settings: Evaluation, key: int
) -> Iterator[Sample]:
    """One grid of the requested classes, a row per class; a single class fills a square.

    Args:
        task: generates images of classes, given by number.
        names: the class names.
        adapter: the model's adapter.
        settings: the classes, and the number of images of each.
        key: seed of the noise, which is the same for every model.
    """
    num_per_class = settings.sample_images
    if unknown := [name for name in settings.prompts if name not in names]:
        raise ConfigError(f"{unknown[0]!r} is no class of pictures: {', '.join(names)} are")
    class_numbers = [names.index(name) for name in settings.prompts or names]
    if num_per_class and class_numbers:
        labels = [number for number in class_numbers for _ in range(num_per_class)]
        generated = task.generate(adapter, labels, key, settings)
        columns = num_per_class if len(class_numbers) > 1 else math.isqrt(num_per_class - 1) + 1
        yield Sample(
            ", ".join(names[n] for n in class_numbers), image=make_grid(generated, columns)
        )


def encode_png(image: Tensor) -> bytes:
    """An image, uint8 `[channels, height, width]`, as the contents of a PNG file.

    A small image is enlarged: each pixel becomes a square.
    """
    scale = -(-MIN_VISIBLE_SIDE // max(image.shape[1:]))
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "png")
    return buffer.getvalue()
