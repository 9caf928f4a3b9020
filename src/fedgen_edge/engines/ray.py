"""Workers on a Ray cluster: each has a backbone, and a part of every cohort.

Ray pickles the messages between a cluster's processes: all of them belong to one user, and nothing
that others made is read that way. The work is assigned before it starts, and no result depends on
which worker computes it: a worker that dies is restarted, and its part done again, with the same
result to the last bit.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import inf
from operator import itemgetter
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from fedgen_edge.compression.serialize import encode
from fedgen_edge.engines.stacked import make_stacks
from fedgen_edge.engines.workers import (
    JobFactory,
    WorkerBatch,
    WorkerResult,
    assign_loads,
    make_batch,
    restore_result,
    run_batch,
)
from fedgen_edge.errors import ConfigError, FedGenError, TrainingError, WorkerError
from fedgen_edge.federation.jobs import Engine, Job, Train, TuningResult
from fedgen_edge.federation.personalize import Personalize
from fedgen_edge.types import Order, Update

MAX_RETRIES = 3
"""How often a part of a round is retried after its worker was lost."""
CONNECT_TIMEOUT = 10.0
"""Seconds that a cluster has to answer."""


class WorkerResources(NamedTuple):
    """The resources that a worker needs."""

    cpus: int = 1
    gpus: int = 0


class Worker:
    """One process; it makes its jobs with the first batch, so that a failure surfaces there."""

    def __init__(self, make_job_factory: Callable[[], JobFactory]) -> None:
        self._make_job_factory = make_job_factory

    @cached_property
    def job_factory(self) -> JobFactory:
        """The job factory of this worker, with a backbone and data of its own."""
        return self._make_job_factory()

    def do(self, work: WorkerBatch, *received: bytes) -> list[list[WorkerResult]]:
        """Carry out a batch of work.

        Raises:
            FedGenError: of a kind that can be pickled.
        """
        try:
            return run_batch(self.job_factory, work, received)
        except TrainingError:
            raise
        except FedGenError as error:
            raise FedGenError(f"a worker of engine.name='ray': {error}") from None


DEFAULT_RESOURCES = WorkerResources()


@dataclass
class RayWorkerPool:
    """The workers of a run, which start with its first orders.

    Source: Moritz et al. 2018, Ray (arXiv:1712.05889).
    """

    make_job_factory: Callable[[], JobFactory]
    """Makes a worker's job factory from its settings, in the worker's process."""
    resources: WorkerResources = DEFAULT_RESOURCES
    workers: int | None = None
    """None means as many as the cluster has room for, once it is connected."""
    address: str | None = None
    """Address of the cluster; None means a cluster on this machine alone."""
    _handles: list[Any] = field(default_factory=list)
    _owns_cluster: bool = False

    def connect(self) -> int:
        """Connect to the cluster, or start one if no address is given.

        Returns:
            The number of workers.

        Raises:
            ConfigError: no cluster answers, or it has no room for the workers.
        """
        if not ray.is_initialized():
            _connect(self.address)
            self._owns_cluster = True
        if self.workers is None or not self._handles:
            self.workers = _count_workers(self.workers, self.resources)
        return self.workers

    def engine(self, method: str, stack: int | None, *, sums: bool) -> Engine:
        """Return the engine of a method; see `workers.WorkerPool`."""

        def run(orders: Sequence[Order], job: Job) -> Iterator[Update | TuningResult]:
            if not isinstance(job, Train | Personalize):
                raise TypeError("workers do the jobs of a simulation, and no others")
            parts = [[o] for o in orders] if stack is None else [*make_stacks(orders, job, stack)]
            workers = self._start_workers()
            shares = assign_loads([sum(map(job.steps, part)) for part in parts], len(workers))
            adapter_refs: dict[int, ray.ObjectRef] = {}
            calls = []
            for worker, share in zip(workers, shares, strict=True):
                worker_parts = [parts[at] for at in share]
                work, adapters = make_batch(
                    method, job, worker_parts, stacked=stack is not None, sums=sums
                )
                adapter_refs |= {
                    id(v): ray.put(encode(v)) for v in adapters if id(v) not in adapter_refs
                }
                calls += (
                    [worker.do.remote(work, *(adapter_refs[id(v)] for v in adapters))]
                    if worker_parts
                    else []
                )
            orders_by_clients = {order.clients: order for order in orders}
            placed_results = zip(
                chain.from_iterable(shares), chain.from_iterable(_get_results(calls)), strict=True
            )
            for _, results in sorted(placed_results, key=itemgetter(0)):
                yield from (restore_result(one, orders_by_clients) for one in results)

        return run

    def close(self) -> None:
        """Stop the workers, and also the cluster or the connection if this pool started it."""
        for handle in self._handles:
            with suppress(RayError):
                ray.kill(handle)
        self._handles.clear()
        if self._owns_cluster:
            ray.shutdown()
        self._owns_cluster = False

    def _start_workers(self) -> list[Any]:
        """Return the workers, starting them if needed."""
        workers = self.connect()
        if not self._handles:
            cpus, gpus = self.resources
            kind = ray.remote(Worker).options(
                num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=MAX_RETRIES
            )
            self._handles += [kind.remote(self.make_job_factory) for _ in range(workers)]
        return self._handles


def _connect(address: str | None, **resources: int) -> None:
    """Connect to a cluster, or start one with this machine's resources or those given.

    Raises:
        ConfigError: no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise a new cluster reports usage
    log_options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", include_dashboard=False, **resources, **log_options)
        return
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for minutes
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
        ray.init(address, **log_options)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        message = str(error).partition("\n")[0]
        raise ConfigError(
            f"engine.address={address!r} is no cluster of Ray's that lets us in: "
            f"{message}; say its "
            "host:port, and its token by RAY_AUTH_TOKEN, or leave it out for one of this machine"
        ) from None


def _count_workers(requested: int | None, resources: WorkerResources) -> int:
    """Return the requested number of workers, or as many as fit.

    Raises:
        ConfigError: the requested workers do not fit.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    capacity = int(
        sum(
            min(m.get("CPU", 0) // resources.cpus, _count_gpu_slots(m, resources)) for m in machines
        )
    )
    if 1 <= (requested or 1) <= capacity:
        return requested or capacity
    resource_text = "an accelerator" if resources.gpus else f"engine.threads={resources.cpus} cores"
    raise ConfigError(
        f"engine.workers={requested or 1}, with {resource_text} each, do not fit the "
        "cluster, which has room "
        f"for {capacity}: lower one of them (of a run that has begun, in its "
        "settings.toml), or name a "
        "larger cluster by engine.address"
    )


def _count_gpu_slots(machine: Mapping[str, float], resources: WorkerResources) -> float:
    return machine.get("GPU", 0.0) // resources.gpus if resources.gpus else inf


def _get_results(calls: Sequence[Any]) -> list[list[list[WorkerResult]]]:
    """Return the results of every worker.

    Raises:
        FedGenError: a worker raised it.
        WorkerError: a worker was lost too often.
    """
    try:
        return ray.get(list(calls))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, FedGenError) else error) from None
    except RayError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise WorkerError(
            "engine.name='ray': a worker was lost, and its work was tried "
            f"{MAX_RETRIES + 1} times, or "
            "it never began: if memory ran out, lower engine.stack or engine.workers; Ray says: "
            f"{reason}"
        ) from None
