"""A frozen backbone and its adapter, in memory and on disk, for any task."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, nn

from fedgen_edge import files
from fedgen_edge.adapters import peft_check, peft_io
from fedgen_edge.adapters.full import Full
from fedgen_edge.adapters.lora import Lora, inject, merge
from fedgen_edge.config import Adapter, Settings
from fedgen_edge.errors import AdapterError, ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.types import AVERAGE, RESIDUAL, Leaves


@dataclass(frozen=True)
class AdaptedModel:
    """One backbone in memory, and its origin."""

    network: nn.Module
    adapter: Lora | Full
    folder: Path
    """The folder from which other libraries load the same backbone."""
    sha256: str
    """Hash of its weights."""
    write: Callable[[Path, Leaves], None]
    """Writes a full model with these weights into a folder, as its library does."""
    weights: str
    """The name of the weights file in such a folder."""
    peft: Mapping[str, Any] = field(default_factory=dict)
    """More fields for an adapter's configuration, such as PEFT's task type."""
    part: str | None = None
    """The network's name in diffusers' pipelines, if they can load adapters for it."""
    initial: Leaves | None = None
    """The adapter to start from."""
    averaged: str = "-"
    """Prefix of the leaves that have a moving average."""
    forward: peft_check.Forward | None = None
    """A short forward pass, used to compare how other libraries read its adapters."""

    @property
    def is_stackable(self) -> bool:
        """Whether clients' adapters can share one forward pass."""
        return isinstance(self.adapter, Lora)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights and of the arithmetic."""
        return next(self.network.parameters()).dtype

    def init(self, rng: Generator) -> Leaves:
        """The initial adapter if there is one, otherwise a fresh one."""
        return self._with_averages(self.initial or self.adapter.init(rng))

    def _with_averages(self, leaves: Leaves) -> Leaves:
        averaged_names = (k for k in leaves if k.startswith(self.averaged))
        return {**leaves, **{AVERAGE + k: leaves[k].clone() for k in averaged_names}}

    def get_backbone_leaves(self) -> Leaves:
        """The leaves with which the model equals the original backbone."""
        return {} if isinstance(self.adapter, Lora) else self.adapter.init(Generator())

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of an adapter."""
        shapes = self.adapter.shapes()
        return shapes | {AVERAGE + k: v for k, v in shapes.items() if k.startswith(self.averaged)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of the backbone; tied weights appear once."""
        named = self.network.named_parameters()
        return {name.replace(".base.", "."): tuple(p.shape) for name, p in named}

    def save(
        self, folder: Path, leaves: Leaves, settings: Settings, provenance: Mapping[str, Any]
    ) -> None:
        """Write an adapter as a PEFT folder, which diffusers also loads if it supports the network.

        A full model is written in its library's format. Moving averages replace the leaves that
        they follow.
        """
        if isinstance(self.adapter, Full):
            self._save_whole(folder, leaves, provenance)
            return
        with _replace_folder(folder) as draft:
            joined, rank = self.adapter.join_residuals(use_averages(leaves))
            adapter_settings = peft_io.change_rank(settings.adapter, rank)
            peft_io.write(
                draft,
                joined,
                self.adapter,
                adapter_settings,
                backbone={"base_model_name_or_path": str(self.folder), **self.peft},
                provenance=provenance,
            )
            if self.part:
                peft_io.write_pipeline_weights(
                    draft, self.part, joined, self.adapter, adapter_settings
                )

    def check_peft(self, settings: Settings) -> None:
        """Refuse layers whose adapters PEFT would read differently.

        Raises:
            ConfigError: PEFT differs; the message names layers that work.
        """
        fault = self._find_reading_fault(settings)
        if fault is None or not isinstance(self.adapter, Lora):
            return
        names = {name.rsplit(".", 1)[-1] for name in self.adapter.layers}
        working = sorted(
            n for n in names if self._restrict_layers(n)._find_reading_fault(settings) is None
        )
        if self._restrict_layers(*working)._find_reading_fault(settings) is not None:
            working = []
        chosen = list(self._restrict_layers(*working).adapter.targets)  # pyright: ignore[reportAttributeAccessIssue]
        advice = f"adapter.target_modules={chosen} works" if working else "take another backbone"
        raise ConfigError(
            f"adapter.target_modules={list(settings.adapter.target_modules) or sorted(names)}: "
            f"PEFT would read another adapter from what a run writes ({fault}): {advice}"
        )

    def _restrict_layers(self, *names: str) -> "AdaptedModel":
        """This backbone with adapters only for the layers with these last name components.

        If the targets are not last components, these would match more layers than the targets do:
        then layers are named in full.
        """
        assert isinstance(self.adapter, Lora)
        are_last_names = {*self.adapter.targets} <= {
            k.rsplit(".", 1)[-1] for k in self.adapter.layers
        }
        layers = {k: v for k, v in self.adapter.layers.items() if k.rsplit(".", 1)[-1] in names}
        targets = names if are_last_names else tuple(layers)
        return replace(self, adapter=replace(self.adapter, layers=layers, targets=targets))

    def _find_reading_fault(self, settings: Settings) -> str | None:
        """How PEFT differs after writing and reading a noisy adapter; None if it agrees.

        A fresh adapter would prove nothing, because its update is zero.
        """
        if self.forward is None or not isinstance(self.adapter, Lora) or not self.adapter.layers:
            return None
        leaves = peft_check.draw_noisy(self.adapter, generator("peft"))
        with TemporaryDirectory(prefix="fedgen-") as root:
            self.save(Path(root) / "adapter", leaves, settings, {})
            return self._compare_with_peft(Path(root) / "adapter", leaves)

    def _compare_with_peft(self, folder: Path, leaves: Leaves) -> str | None:
        assert isinstance(self.adapter, Lora)
        assert self.forward is not None
        return peft_check.compare(folder, self.network, self.adapter, leaves, self.forward)

    def check_written(self, folder: Path, leaves: Leaves) -> None:
        """Compare a folder written by `save`, as PEFT reads it, with the adapter.

        Raises:
            AdapterError: they differ.
        """
        if self.forward is None or not isinstance(self.adapter, Lora):
            return
        if fault := self._compare_with_peft(folder, use_averages(leaves)):
            raise AdapterError(
                f"{folder}: PEFT reads another adapter from it than was trained ({fault}): "
                "the checkpoint stands: take the whole model instead, by `fedgen export --merge`, "
                "which does not need PEFT"
            )

    def load(self, folder: Path) -> Leaves:
        """The leaves that `save` wrote."""
        if isinstance(self.adapter, Lora):
            return self._with_averages(peft_io.read(folder, self.adapter, any_rank=True))
        path = folder / self.weights
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise AdapterError(f"{path} is damaged: {error}") from None
        _check_weights(path, weights, self.adapter.shapes())
        return self._with_averages(weights)

    def save_merged(self, folder: Path, leaves: Leaves) -> None:
        """Write the backbone with an adapter merged into it; do not use this model afterwards."""
        if isinstance(self.adapter, Lora):
            merge(self.network.float(), self.adapter, use_averages(leaves))
            leaves = self.network.state_dict()
        self._save_whole(folder, leaves, {"backbone_sha256": self.sha256, "merged": True})

    def write_whole(self, folder: Path, leaves: Leaves) -> None:
        """Fill a folder with a full model of these weights, as its library does."""
        self.write(folder, use_averages(leaves))

    def _save_whole(self, folder: Path, leaves: Leaves, provenance: Mapping[str, Any]) -> None:
        with _replace_folder(folder) as draft:
            (draft / peft_io.PROVENANCE).write_text(
                json.dumps(provenance, indent=1, sort_keys=True)
            )
            self.write_whole(draft, leaves)


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A draft folder from `files.replace_folder`.

    Raises:
        OSError: the disk is full or failing, for which safetensors has its own error.
    """
    try:
        with files.replace_folder(folder) as draft:
            yield draft
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from None


def drop_averages(leaves: Leaves) -> Leaves:
    """The leaves without moving averages."""
    return {k: v for k, v in leaves.items() if not k.removeprefix(RESIDUAL).startswith(AVERAGE)}


def use_averages(leaves: Leaves) -> Leaves:
    """The leaves for inference: moving averages replace the leaves that they follow."""
    return {k: leaves.get(_name_average(k), v) for k, v in drop_averages(leaves).items()}


def _name_average(name: str) -> str:
    """The name of a leaf's moving average."""
    leaf_name = name.removeprefix(RESIDUAL)
    return f"{name.removesuffix(leaf_name)}{AVERAGE}{leaf_name}"


def update_averages(leaves: Leaves, decay: float) -> Leaves:
    """The moving averages, each one step closer to the leaf that it follows."""
    return {
        k: torch.lerp(leaves[k.removeprefix(AVERAGE)], average, decay)
        for k, average in leaves.items()
        if k.startswith(AVERAGE)
    }


def adapt(
    network: nn.Module, settings: Adapter, targets: Sequence[str], *, full: bool, **where: Any
) -> AdaptedModel:
    """Freeze a network, and give it an adapter or make all its weights trainable.

    Args:
        network: changed in place.
        settings: the adapter's settings, including its initial adapter.
        targets: the layers to adapt if the settings name none.
        full: train every weight instead of an adapter.
        where: the other fields of `AdaptedModel`.
    """
    if full:
        network.requires_grad_(False)
        return AdaptedModel(network, Full(network), **where)
    if settings.initial:
        peft_io.check_origin(settings.initial, where["sha256"])
    lora = inject(network, settings, targets)
    initial = peft_io.read(settings.initial, lora) if settings.initial else None
    return AdaptedModel(network, lora, initial=initial, **where)


def _check_weights(path: Path, weights: Leaves, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a full model's file whose weights do not match the model or are unusable."""
    for name in sorted({*shapes} ^ {*weights}):
        problem = "lacks" if name in shapes else "has another weight,"
        raise AdapterError(f"{path} {problem} {name}: it is not this backbone's: restore it")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            sizes = f"{list(weights[name].shape)}, this backbone needs {list(shape)}"
            raise AdapterError(f"{path}: {name} is {sizes}: restore it")
        if not bool(weights[name].isfinite().all()):
            raise AdapterError(f"{path}: {name} is not finite: the model is unusable")
