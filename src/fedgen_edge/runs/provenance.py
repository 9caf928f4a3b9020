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

from fedgen_edge.compression.serialize import count_encoded_bytes, encode
from fedgen_edge.config import Settings, to_flat_dict
from fedgen_edge.data.corpus import Texts
from fedgen_edge.hardware import describe_hardware
from fedgen_edge.runs.build import Experiment
from fedgen_edge.tasks.task import TextTask, TrainableTask
from fedgen_edge.types import ServerState

LIBRARIES = ("transformers", "peft", "tokenizers", "accelerate", "safetensors", "numpy")


@runtime_checkable
class RunContext(Protocol):
    """What an adapter comes from."""

    @property
    def settings(self) -> Settings:
        """Resolved."""
        ...

    @property
    def task(self) -> TrainableTask:
        """With its backbone."""
        ...


def holdings(experiment: Experiment) -> list[dict[str, Any]]:
    """Who holds what: examples of each split, training items, training examples of each label."""
    labels = experiment.corpus.labels or ()
    participants = len(experiment.holdings) - experiment.settings.federation.unseen_clients
    return [
        {
            "client": own.name,
            "train": len(own.train),
            "validation": len(own.validation),
            "test": len(own.test),
            "items": int(shard.train["mask"].sum()) * experiment.task.measure.values_per_item,
            "newcomer": c >= participants,
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
    examples, task = experiment.corpus.examples, experiment.task
    return (
        isinstance(examples, Texts)
        and isinstance(task, TextTask)
        and task.is_chat_data(examples.texts)
    )


def facts(task: TrainableTask, settings: Settings, device: torch.device) -> dict[str, Any]:
    """The same, but for the data, which may be elsewhere."""
    adapter = task.model.leaf_shapes()
    return {
        "version": version("fedgen-edge"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": library_versions(settings.task),
        "hardware": describe_hardware(device),
        "backbone": {
            "path": str(task.model.folder),
            "sha256": task.model.sha256,
            "parameters": sum(math.prod(s) for s in task.model.shapes().values()),
        },
        "adapter": {"initial_sha256": initial_digest(task)},
        "adapter_parameters": sum(math.prod(s) for s in adapter.values()),
        "adapter_bytes": count_encoded_bytes(adapter),
        "full_bytes": count_encoded_bytes(task.model.shapes()),
        "precision": settings.backbone.precision,
        "device": settings.engine.device,
        "threads": settings.engine.threads,
        "stack": settings.engine.stack,
        "measure": list(task.measure),
        "settings": to_flat_dict(settings),
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
    digest, examples = hashlib.sha256(), experiment.corpus.examples
    for own in experiment.holdings:
        parts = (examples.digest(part) for part in (own.train, own.validation, own.test))
        digest.update(json.dumps([own.name, *parts]).encode())
    return digest.hexdigest()


def initial_digest(task: TrainableTask) -> str | None:
    """SHA-256 of the adapter that training begins from, where it is not a fresh one."""
    initial = task.model.initial
    return None if initial is None else hashlib.sha256(encode(initial)).hexdigest()


def origin(context: RunContext, state: ServerState, client: str) -> dict[str, Any]:
    """What stands beside an adapter."""
    task, settings = context.task, context.settings
    return {
        "backbone": str(task.model.folder),
        "backbone_sha256": task.model.sha256,
        "method": settings.method.name,
        "round": state.round,
        "seed": settings.federation.seed,
        "client": client,
        "fedgen_edge": version("fedgen-edge"),
    }
