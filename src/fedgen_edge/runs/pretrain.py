"""A backbone trained on the public part of the data, by the same loop as a run.

Pictures have one made from nothing; of text one that is there is trained on, or a new one. It is
full-model FedAvg with one client, so checkpoints and exact resume are those of a run.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedgen_edge import files
from fedgen_edge.config import (
    Compression,
    Devices,
    Federation,
    ImageMetrics,
    Method,
    Partition,
    Settings,
    to_toml,
)
from fedgen_edge.data import sources
from fedgen_edge.data.corpus import Images, Texts
from fedgen_edge.errors import ConfigError
from fedgen_edge.runs.build import Experiment
from fedgen_edge.runs.checkpoint import load_latest
from fedgen_edge.runs.federate import federate
from fedgen_edge.runs.models import reopen
from fedgen_edge.runs.provenance import origin
from fedgen_edge.runs.records import lock_run
from fedgen_edge.runs.run import Event, create
from fedgen_edge.tasks.language.config_only import fresh
from fedgen_edge.tasks.task import get_network_shape, make_untrained

STAGE = "pretraining"
HELD_OUT = 0.05
"""Share of the public examples for validation, and for a test that nothing is made of."""


def begin(settings: Settings, out: Path) -> Experiment:
    """The training of a backbone, new, or as `OUT.training` has it.

    Raises:
        ConfigError: it is made already, or other settings have begun it.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: delete it to make it again")
    plan, training_folder = derive_settings(settings), get_training_folder(out)
    plan_toml = to_toml(plan).encode()
    if (training_folder / "run.json").exists():
        plan_file = (
            training_folder / "planned.toml"
        )  # not there where it was stopped before its first round
        if not plan_file.exists() or plan_file.read_bytes() != plan_toml:
            raise ConfigError(
                f"{training_folder} was begun with other settings, or never did: delete "
                "it to begin anew"
            )
        return reopen(training_folder)
    experiment = create(plan, training_folder)
    files.write(training_folder / "planned.toml", plan_toml)
    return experiment


def derive_settings(settings: Settings) -> Settings:
    """The settings of the run that makes the backbone of these."""
    shares = {"validation": HELD_OUT, "test": HELD_OUT, "train_limit": None}
    public = replace(settings.data, part="public", **shares)
    examples, p, backbone = sources.read(public).examples, settings.pretrain, settings.backbone
    if isinstance(examples, Images) == (settings.task == "language"):
        kind = "text" if isinstance(examples, Texts) else "pictures"
        raise ConfigError(
            f"data.source={settings.data.source!r} has {kind}, which task={settings.task!r} does "
            "not learn: set the one, or the other"
        )
    if isinstance(examples, Images) and p.config is not None:
        raise ConfigError(
            f"pretrain.config={p.config!r} is of a language model, and task={settings.task!r} has "
            "networks of its own: leave it out, and set pretrain.size"
        )
    if isinstance(examples, Images):
        shape = get_network_shape(settings, tuple(examples.pixels.shape[1:]))
        folder = make_untrained(settings.task, p.size, shape, len(examples.classes))
        backbone, public = (
            replace(backbone, path=str(folder)),
            replace(public, names=examples.classes),
        )
    elif p.config is not None:
        backbone = replace(backbone, path=str(fresh(p.config, backbone)))
    return replace(
        settings,
        backbone=backbone,
        adapter=replace(settings.adapter, ranks=(), initial=None),
        data=public,
        partition=Partition(by="pooled"),
        federation=Federation(rounds=p.rounds, seed=settings.federation.seed),
        method=Method(name="fedavg-full"),
        uplink=Compression(),
        downlink=Compression(),
        devices=Devices(),
        training=replace(
            settings.training,
            lr=p.lr,
            lr_full=None,
            steps=p.steps,
            batch=p.batch,
            schedule="cosine",
            warmup=0,
        ),
        evaluation=replace(settings.evaluation, baselines=()),
        image_metrics=ImageMetrics(),
    )


def describe_pretraining(experiment: Experiment) -> str:
    """One line on what is about to be trained."""
    s = experiment.settings
    examples = sum(len(own.train) for own in experiment.holdings)
    parameters = sum(map(math.prod, experiment.task.model.shapes().values()))
    return (
        f"pretraining: {examples:,} public examples, {s.federation.rounds} x {s.training.steps} "
        f"steps; {parameters:,} trained parameters; {s.engine.device}, {s.backbone.precision}"
    )


def get_training_folder(out: Path) -> Path:
    """Where a backbone is trained before it is there."""
    return out.with_name(f"{out.name}.training")


def train(experiment: Experiment, out: Path) -> Iterator[Event]:
    """Do what is left of the training, and write the backbone as a folder of its library."""
    training_folder, total = get_training_folder(out), experiment.settings.federation.rounds
    with lock_run(training_folder):
        for line in federate(experiment, training_folder):
            shown = {k: v for k, v in line.items() if k != "bytes_up"}  # nothing is sent
            yield Event(STAGE, line["round"], total, shown)
    state, _ = load_latest(training_folder)
    provenance = origin(experiment, state, "public")
    with files.replace_folder(out) as draft:
        experiment.task.model.write_whole(draft, state.adapter)
        (draft / "provenance.json").write_text(json.dumps(provenance, indent=1, sort_keys=True))
