"""What a run's results rest on: run.json and clients.json."""

import hashlib
import json
import math
import platform
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

import torch

from fedgen_edge.config import Settings, plain
from fedgen_edge.data.corpus import Texts
from fedgen_edge.experiments.build import Experiment
from fedgen_edge.machine import hardware
from fedgen_edge.tasks.task import Learnt, Worded
from fedgen_edge.types import ServerState
from fedgen_edge.uplink.transform import encode, length

LIBRARIES = ("transformers", "peft", "tokenizers", "accelerate", "safetensors", "numpy")


@runtime_checkable
class Made(Protocol):
    """What an adapter comes from."""

    @property
    def settings(self) -> Settings:
        """Resolved."""
        ...

    @property
    def task(self) -> Learnt:
        """With its backbone."""
        ...


def holdings(experiment: Experiment) -> list[dict[str, Any]]:
    """Who holds what: examples of each split, training items, training examples of each label."""
    labels = experiment.corpus.labels or ()
    able = len(experiment.holdings) - experiment.settings.federation.newcomers
    return [
        {
            "client": own.name,
            "train": len(own.train),
            "validation": len(own.validation),
            "test": len(own.test),
            "items": int(shard.train["mask"].sum()) * experiment.task.measure.each,
            "newcomer": c >= able,
            "labels": dict(Counter(labels[i] for i in own.train)) if labels else {},
        }
        for c, (own, shard) in enumerate(
            zip(experiment.holdings, experiment.clients.shards, strict=True)
        )
    ]


def provenance(experiment: Experiment) -> dict[str, Any]:
    """Versions, hardware, backbone, data, and the sizes of what can be sent."""
    return {
        **facts(experiment.task, experiment.settings, experiment.clients.device),
        "data_sha256": data_digest(experiment),
        "duplicates": experiment.corpus.duplicates,
        "blanks": experiment.corpus.blanks,
        "chat": _holds_chats(experiment),
    }


def _holds_chats(experiment: Experiment) -> bool:
    """Whether the texts are chats, in which case a prompt is a user's message."""
    held, task = experiment.corpus.examples, experiment.task
    return isinstance(held, Texts) and isinstance(task, Worded) and task.holds_chats(held.texts)


def facts(task: Learnt, settings: Settings, device: torch.device) -> dict[str, Any]:
    """The same, but for the data, which may be elsewhere."""
    adapter = task.model.leaf_shapes()
    return {
        "version": version("fedgen-edge"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": library_versions(settings.task),
        "hardware": hardware(device),
        "backbone": {
            "path": str(task.model.folder),
            "sha256": task.model.sha256,
            "parameters": sum(math.prod(s) for s in task.model.shapes().values()),
        },
        "adapter": {"initial_sha256": initial_digest(task)},
        "adapter_parameters": sum(math.prod(s) for s in adapter.values()),
        "adapter_bytes": length(adapter),
        "full_bytes": length(task.model.shapes()),
        "precision": settings.backbone.precision,
        "device": settings.engine.device,
        "threads": settings.engine.threads,
        "stack": settings.engine.stack,
        "measure": list(task.measure),
        "settings": plain(settings),
        "finished": False,
    }


def library_versions(task: str) -> dict[str, str]:
    """Versions of the libraries that a run's numbers may depend on, beside torch."""
    names = LIBRARIES if task == "language" else (*LIBRARIES, "diffusers")
    installed = {}
    for name in names:
        with suppress(PackageNotFoundError):  # some tasks of images need no diffusers
            installed[name] = version(name)
    return installed


def versions() -> str:
    """Of what draws an adapter."""
    return f"fedgen-edge {version('fedgen-edge')}, torch {torch.__version__}"


def data_digest(experiment: Experiment) -> str:
    """SHA-256 of who holds which examples for what: a resumed run must find the same."""
    found, examples = hashlib.sha256(), experiment.corpus.examples
    for own in experiment.holdings:
        parts = (examples.digest(part) for part in (own.train, own.validation, own.test))
        found.update(json.dumps([own.name, *parts]).encode())
    return found.hexdigest()


def initial_digest(task: Learnt) -> str | None:
    """SHA-256 of the adapter that training begins from, where it is not a fresh one."""
    initial = task.model.initial
    return None if initial is None else hashlib.sha256(encode(initial)).hexdigest()


def origin(made: Made, state: ServerState, client: str) -> dict[str, Any]:
    """What stands beside an adapter."""
    task, settings = made.task, made.settings
    return {
        "backbone": str(task.model.folder),
        "backbone_sha256": task.model.sha256,
        "method": settings.method.name,
        "round": state.round,
        "seed": settings.federation.seed,
        "client": client,
        "fedgen_edge": version("fedgen-edge"),
    }
