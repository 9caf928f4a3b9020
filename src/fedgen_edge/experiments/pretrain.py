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
    Devices,
    Downlink,
    Federation,
    Judging,
    Method,
    Partition,
    Settings,
    Uplink,
    to_toml,
)
from fedgen_edge.data import sources
from fedgen_edge.data.corpus import Images, Texts
from fedgen_edge.errors import ConfigError
from fedgen_edge.experiments.build import Experiment
from fedgen_edge.experiments.checkpoint import last
from fedgen_edge.experiments.federate import federate
from fedgen_edge.experiments.models import reopen
from fedgen_edge.experiments.provenance import origin
from fedgen_edge.experiments.records import locked
from fedgen_edge.experiments.run import Event, create
from fedgen_edge.tasks.outline import fresh
from fedgen_edge.tasks.task import shape_learnt, untrained

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
    plan, work = planned(settings), working(out)
    told = to_toml(plan).encode()
    if (work / "run.json").exists():
        begun = work / "planned.toml"  # not there where it was stopped before its first round
        if not begun.exists() or begun.read_bytes() != told:
            raise ConfigError(
                f"{work} was begun with other settings, or never did: delete it to begin anew"
            )
        return reopen(work)
    experiment = create(plan, work)
    files.write(work / "planned.toml", told)
    return experiment


def planned(settings: Settings) -> Settings:
    """The settings of the run that makes the backbone of these."""
    shares = {"validation": HELD_OUT, "test": HELD_OUT, "train_limit": None}
    public = replace(settings.data, part="public", **shares)
    held, p, backbone = sources.read(public).examples, settings.pretrain, settings.backbone
    if isinstance(held, Images) == (settings.task == "language"):
        kind = "text" if isinstance(held, Texts) else "pictures"
        raise ConfigError(
            f"data.source={settings.data.source!r} has {kind}, which task={settings.task!r} does "
            "not learn: set the one, or the other"
        )
    if isinstance(held, Images) and p.config is not None:
        raise ConfigError(
            f"pretrain.config={p.config!r} is of a language model, and task={settings.task!r} has "
            "networks of its own: leave it out, and set pretrain.size"
        )
    if isinstance(held, Images):
        shape = shape_learnt(settings, tuple(held.pixels.shape[1:]))
        folder = untrained(settings.task, p.size, shape, len(held.classes))
        backbone, public = replace(backbone, path=str(folder)), replace(public, names=held.classes)
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
        uplink=Uplink(),
        downlink=Downlink(),
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
        judging=Judging(),
    )


def heading(experiment: Experiment) -> str:
    """One line on what is about to be trained."""
    s = experiment.settings
    examples = sum(len(own.train) for own in experiment.holdings)
    parameters = sum(map(math.prod, experiment.task.model.shapes().values()))
    return (
        f"pretraining: {examples:,} public examples, {s.federation.rounds} x {s.training.steps} "
        f"steps; {parameters:,} trained parameters; {s.engine.device}, {s.backbone.precision}"
    )


def working(out: Path) -> Path:
    """Where a backbone is trained before it is there."""
    return out.with_name(f"{out.name}.training")


def train(experiment: Experiment, out: Path) -> Iterator[Event]:
    """Do what is left of the training, and write the backbone as a folder of its library."""
    work, total = working(out), experiment.settings.federation.rounds
    with locked(work):
        for line in federate(experiment, work):
            shown = {k: v for k, v in line.items() if k != "bytes_up"}  # nothing is sent
            yield Event(STAGE, line["round"], total, shown)
    state, _ = last(work)
    told = origin(experiment, state, "public")
    with files.folder(out) as draft:
        experiment.task.model.write_whole(draft, state.adapter)
        (draft / "provenance.json").write_text(json.dumps(told, indent=1, sort_keys=True))
