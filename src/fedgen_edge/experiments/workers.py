"""A run's workers on a cluster: what they need of it, and what they make of the settings."""

from collections.abc import MutableMapping
from dataclasses import replace
from functools import cache, partial

from fedgen_edge.config import Engine, Settings
from fedgen_edge.engines.ray import Fleet, Room
from fedgen_edge.engines.staff import Jobs, Kind
from fedgen_edge.experiments.build import Experiment, beside, build
from fedgen_edge.jobs import Job, Train
from fedgen_edge.machine import steady_allocations
from fedgen_edge.types import Leaves


def staffed(experiment: Experiment) -> Experiment:
    """The same, its cluster connected, and the number of its workers in its settings.

    Raises:
        ConfigError: there is no such cluster, or it has no room for them.
    """
    settings, told = experiment.settings, experiment.settings.engine
    room = Room(1, 1) if told.device.startswith("cuda") else Room(told.threads or 1)
    fleet = Fleet(partial(jobs, settings), room, told.workers, told.address)
    engine = replace(told, workers=fleet.connect())
    return replace(experiment, settings=replace(settings, engine=engine), staff=fleet)


def jobs(settings: Settings) -> Jobs:
    """What a worker does: the jobs of the same settings, built where it runs.

    Files must be there by the same names as where the run was begun.
    """
    steady_allocations()
    told = settings.engine
    device = told.device.partition(":")[0]  # of accelerators it sees one, its own
    alone = Engine("serial", device=device, threads=told.threads, compile=told.compile)
    experiment = build(replace(settings, engine=alone))
    of = cache(partial(beside, experiment))

    def job(method: str, kind: Kind, memory: MutableMapping[int, Leaves]) -> Job:
        own = of(method).remembering(memory)
        return own.train if kind is Train else own.tune

    return job
