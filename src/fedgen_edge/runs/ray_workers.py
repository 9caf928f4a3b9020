"""A run's workers on a cluster: what they need of it, and what they make of the settings."""

from collections.abc import MutableMapping
from dataclasses import replace
from functools import cache, partial

from fedgen_edge.config import Engine, Settings
from fedgen_edge.engines.ray import RayWorkerPool, WorkerResources
from fedgen_edge.engines.workers import JobFactory, JobType
from fedgen_edge.federation.jobs import Job, Train
from fedgen_edge.hardware import steady_allocations
from fedgen_edge.runs.build import Experiment, build, with_method
from fedgen_edge.types import Leaves


def connect_workers(experiment: Experiment) -> Experiment:
    """The same, its cluster connected, and the number of its workers in its settings.

    Raises:
        ConfigError: there is no such cluster, or it has no room for them.
    """
    settings, engine_settings = experiment.settings, experiment.settings.engine
    room = (
        WorkerResources(1, 1)
        if engine_settings.device.startswith("cuda")
        else WorkerResources(engine_settings.threads or 1)
    )
    fleet = RayWorkerPool(
        partial(jobs, settings), room, engine_settings.workers, engine_settings.address
    )
    engine = replace(engine_settings, workers=fleet.connect())
    return replace(experiment, settings=replace(settings, engine=engine), worker_pool=fleet)


def jobs(settings: Settings) -> JobFactory:
    """What a worker does: the jobs of the same settings, built where it runs.

    Files must be there by the same names as where the run was begun.
    """
    steady_allocations()
    engine_settings = settings.engine
    device = engine_settings.device.partition(":")[0]  # of accelerators it sees one, its own
    serial_engine = Engine(
        "serial", device=device, threads=engine_settings.threads, compile=engine_settings.compile
    )
    experiment = build(replace(settings, engine=serial_engine))
    experiment_for = cache(partial(with_method, experiment))

    def job(method: str, kind: JobType, memory: MutableMapping[int, Leaves]) -> Job:
        method_experiment = experiment_for(method).with_client_states(memory)
        return method_experiment.train if kind is Train else method_experiment.tune

    return job
