"""The contract of a task: a frozen backbone, and how to train and judge an adapter; TASKS."""

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
    """What a federation trains; the backbone is its own, and never changes."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Parts of the adapter, trained in this order on each batch; one `Phase()` is all."""
        ...

    def init(self, rng: Generator) -> Leaves:
        """A fresh adapter."""
        ...

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        """One client's examples, with every random number that the loss needs."""
        ...

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        """Summed loss, in the measure's unit, and count, each `[*clients]`. Deterministic.

        What `batch["mask"]` leaves out adds nothing to either: rows of zeros are padding.
        """
        ...

    @property
    def settle(self) -> Callable[[Leaves], Leaves]:
        """After a batch: new values of the leaves that follow others, `[*clients, *shape]` each."""
        ...

    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        """Held-out sums per client, which add up over batches and clients."""
        ...

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        """Metrics of those sums, `[*clients]` each; `loss` is the one that training lowers."""
        ...


@runtime_checkable
class PrecomputableTask(Task, Protocol):
    """A task of which some work on examples is the same whenever they are met."""

    def precompute(self, client_examples: Iterable[Batch]) -> list[Batch] | None:
        """Clients' examples with that work done, `[rows, ...]` each; none, if there is none.

        Loss and evaluation are the same with it, and do it where examples come without.
        """
        ...


class Sample(NamedTuple):
    """What a model made when it was asked to."""

    prompt: str
    text: str = ""
    """Of a language model: the prompt and how it goes on."""
    image: Tensor | None = None
    """uint8 `[channels, height, width]`."""


@runtime_checkable
class TrainableTask(Task, Protocol):
    """What a run needs of a task beside its training."""

    @property
    def model(self) -> AdaptedModel:
        """The backbone and its adapter."""
        ...

    @property
    def measure(self) -> Measure:
        """What its models are judged by."""
        ...

    def examples(self, corpus: Corpus, indices: Sequence[int]) -> Batch:
        """Some of the corpus as batches hold them: `[rows, ...]` each, and `mask`.

        Raises:
            ConfigError: they are not for this task, or not for its backbone.
        """
        ...

    def samples(self, adapter: Leaves, settings: Evaluation, key: int) -> Iterator[Sample]:
        """What the model makes of each prompt, or of its own choice where there are none."""
        ...


@runtime_checkable
class TextTask(TrainableTask, Protocol):
    """What generating text needs of a task."""

    def generate(
        self, adapter: Leaves, prompt: str, decoding: Decoding, seed: int, *, chat: bool = False
    ) -> str:
        """A prompt and how it goes on, or the answer to it."""
        ...

    def is_chat_data(self, texts: Sequence[str]) -> bool:
        """Whether most texts are written by the backbone's chat template."""
        ...


@runtime_checkable
class ImageTask(TrainableTask, Protocol):
    """What judging by samples needs of a task."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height and width."""
        ...

    def generate(
        self, adapter: Leaves, labels: Sequence[int], key: int, settings: Evaluation
    ) -> Tensor:
        """Pictures of these classes, uint8 `[pictures, channels, height, width]`.

        The noise of each goes by the key and its place, the same for every model.
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
    """The shape of what a network of these settings works on, for pictures of this shape."""
    if settings.backbone.autoencoder is None or settings.task != "diffusion":
        return image_shape
    return _import_task(settings.task).get_network_shape(settings.backbone, image_shape)


def make_untrained(name: str, size: str, shape: tuple[int, ...], classes: int) -> Path:
    """A folder with a network of the task that has learnt nothing, equal on every machine.

    Args:
        name: of the task.
        size: tiny, small or large.
        shape: of what it works on: channels, height and width.
        classes: how many it is to know.
    """
    module = _import_task(name)
    shape_text = "x".join(map(str, shape))
    make = partial(module.fresh, size, shape, classes)
    return pretrained.fill_cache(f"{name}-{size}-{shape_text}-{classes}-2", make)


TASKS: dict[str, Callable[..., TrainableTask]] = {
    name: partial(_build_task, name) for name in _HOMES
}
"""How each task is built: from settings, `full` (train every weight instead of an adapter) and a
device. Its libraries are imported then, and not before."""
