"""The protocol of a task (a frozen backbone, and how to train and judge an adapter), and TASKS."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from fedgen_edge.config import Evaluation, Settings
from fedgen_edge.data.corpus import Corpus
from fedgen_edge.errors import ConfigError, MissingExtraError
from fedgen_edge.tasks.adapted import AdaptedModel
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.generation import Decoding
from fedgen_edge.tasks.measure import Measure
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics


@runtime_checkable
class Task(Protocol):
    """What a federation trains; a task owns its backbone, which never changes."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Parts of the adapter, trained in this order on each batch; one `Phase()` covers all."""
        ...

    def init(self, rng: Generator) -> Leaves:
        """A fresh adapter."""
        ...

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """One client's examples, with every random number that the loss needs."""
        ...

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed loss, in the measure's unit, and count, each `[*clients]`. Deterministic.

        Entries where `batch["mask"]` is zero add nothing to either: they are padding.
        """
        ...

    @property
    def settle(self) -> Callable[[Leaves], Leaves]:
        """Computes, after a batch, the leaves that follow others, `[*clients, *shape]` each."""
        ...

    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Held-out sums per client, which add up over batches and clients."""
        ...

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Metrics from those sums, `[*clients]` each; `loss` is the one that training lowers."""
        ...


@runtime_checkable
class PrecomputableTask(Task, Protocol):
    """A task that can precompute work on examples that is the same in every epoch."""

    def precompute(self, client_examples: Iterable[Batch]) -> list[Batch] | None:
        """Clients' examples with that work done, `[rows, ...]` each; None if there is no such work.

        Loss and evaluation give the same results, and do the work themselves where it is missing.
        """
        ...


class Sample(NamedTuple):
    """One generated sample."""

    prompt: str
    text: str = ""
    """For a language model: the prompt and its continuation."""
    image: Tensor | None = None
    """uint8 `[channels, height, width]`."""


@runtime_checkable
class TrainableTask(Task, Protocol):
    """What a run needs from a task besides training."""

    @property
    def model(self) -> AdaptedModel:
        """The backbone and its adapter."""
        ...

    @property
    def measure(self) -> Measure:
        """The metric for its models."""
        ...

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Selected examples of the corpus as batch fields, `[rows, ...]` each, and `mask`.

        Raises:
            ConfigError: the examples do not fit this task or its backbone.
        """
        ...

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """What the model generates for each prompt, or unprompted if there are none."""
        ...


@runtime_checkable
class TextTask(TrainableTask, Protocol):
    """What text generation needs from a task."""

    def generate(
        self, adapter: Leaves, prompt: str, decoding: Decoding, seed: int, *, chat: bool = False
    ) -> str:
        """A prompt and its continuation, or the answer to it."""
        ...

    def is_chat_data(self, texts: Sequence[str]) -> bool:
        """Whether most texts follow the backbone's chat template."""
        ...


@runtime_checkable
class ImageTask(TrainableTask, Protocol):
    """What evaluation by samples needs from a task."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: channels, height and width."""
        ...

    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """Images of these classes, uint8 `[images, channels, height, width]`.

        The noise of each depends on the key and its position, and is the same for every model.
        """
        ...


def _build_task(
    name: str, settings: Settings, *, full: bool, device: torch.device
) -> TrainableTask:
    if settings.backbone.autoencoder is not None and name != "diffusion":
        raise ConfigError(
            f"backbone.autoencoder={str(settings.backbone.autoencoder)!r} makes latents for "
            f"task='diffusion', and task={name!r} has none: leave it out"
        )
    return _import_task(name).build(settings, full=full, device=device)


_HOMES = {
    "language": "language.task",
    "diffusion": "images.diffusion",
    "gan": "images.gan",
    "vae": "images.vae",
}


def _import_task(name: str) -> Any:
    try:
        return import_module(f"fedgen_edge.tasks.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise MissingExtraError(f"task={name!r}", "images") from None


def get_network_shape(settings: Settings, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a network's input under these settings, for images of this shape."""
    if settings.backbone.autoencoder is None or settings.task != "diffusion":
        return image_shape
    return _import_task(settings.task).get_network_shape(settings.backbone, image_shape)


def make_untrained(name: str, size: str, shape: tuple[int, ...], classes: int) -> Path:
    """A folder with an untrained network for the task, identical on every machine.

    Args:
        name: the task's name.
        size: tiny, small or large.
        shape: the network's input shape: channels, height and width.
        classes: the number of classes.
    """
    module = _import_task(name)
    shape_text = "x".join(map(str, shape))
    make = partial(module.fresh, size, shape, classes)
    return pretrained.fill_cache(f"{name}-{size}-{shape_text}-{classes}-2", make)


TASKS: dict[str, Callable[..., TrainableTask]] = {
    name: partial(_build_task, name) for name in _HOMES
}
"""Builders of tasks, from settings, `full` (train every weight instead of an adapter) and a device.
A task's libraries are imported when it is built."""
