"""Workers on a cluster of Ray's: each has a backbone, and a part of every cohort.

What a cluster's processes say to each other is Ray's business, which pickles it: all of them are
one user's, and nothing of a run that others made is read that way. Which worker does what is known
before anything is done, and nothing that is done depends on who does it: a worker that dies is
started anew, and its part done again, with the same result to the last bit.
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

from fedgen_edge.engines.stacked import stacks
from fedgen_edge.engines.staff import Jobs, Said, Work, asked, dealt, done, heard
from fedgen_edge.errors import ConfigError, FedGenError, TrainingError, WorkerError
from fedgen_edge.jobs import Engine, Job, Train, Tuned
from fedgen_edge.personal import Personalise
from fedgen_edge.types import Order, Update
from fedgen_edge.uplink.transform import encode

AGAIN = 3
"""Times that a part of a round is done again, after its worker was lost."""
SECONDS = 10.0
"""That a cluster has to answer."""


class Room(NamedTuple):
    """What a worker takes of a machine."""

    cpus: int = 1
    gpus: int = 0


class Worker:
    """One process: its jobs are made with the first work, so that a failure there is work's."""

    def __init__(self, make: Callable[[], Jobs]) -> None:
        self._make = make

    @cached_property
    def jobs(self) -> Jobs:
        """Of a backbone and data of its own."""
        return self._make()

    def do(self, work: Work, *received: bytes) -> list[list[Said]]:
        """Carry out what is asked.

        Raises:
            FedGenError: of a kind that can be sent.
        """
        try:
            return done(self.jobs, work, received)
        except TrainingError:
            raise
        except FedGenError as error:
            raise FedGenError(f"a worker of engine.name='ray': {error}") from None


ONE = Room()


@dataclass
class Fleet:
    """Workers of a run, which begin with its first orders.

    Source: Moritz et al. 2018, Ray (arXiv:1712.05889).
    """

    make: Callable[[], Jobs]
    """What a worker makes of its settings, in its own process."""
    room: Room = ONE
    workers: int | None = None
    """None is as many as the cluster has room for, once it is connected."""
    address: str | None = None
    """Of the cluster; none is one of this machine alone."""
    _handles: list[Any] = field(default_factory=list)
    _ours: bool = False

    def connect(self) -> int:
        """Reach the cluster, or start one where no address is given.

        Returns:
            How many workers there will be.

        Raises:
            ConfigError: nothing answers, or it has no room for them.
        """
        if not ray.is_initialized():
            _connect(self.address)
            self._ours = True
        if self.workers is None or not self._handles:
            self.workers = _fitting(self.workers, self.room)
        return self.workers

    def engine(self, method: str, stack: int | None, *, sums: bool) -> Engine:
        """The engine of a method; see `staff.Staff`."""

        def run(orders: Sequence[Order], job: Job) -> Iterator[Update | Tuned]:
            if not isinstance(job, Train | Personalise):
                raise TypeError("workers do the jobs of a simulation, and no others")
            parts = [[o] for o in orders] if stack is None else [*stacks(orders, job, stack)]
            workers = self._begun()
            shares = dealt([sum(map(job.steps, part)) for part in parts], len(workers))
            told: dict[int, ray.ObjectRef] = {}
            calls = []
            for worker, share in zip(workers, shares, strict=True):
                mine = [parts[at] for at in share]
                work, adapters = asked(method, job, mine, stacked=stack is not None, sums=sums)
                told |= {id(v): ray.put(encode(v)) for v in adapters if id(v) not in told}
                calls += [worker.do.remote(work, *(told[id(v)] for v in adapters))] if mine else []
            given = {order.clients: order for order in orders}
            said = zip(
                chain.from_iterable(shares), chain.from_iterable(_answers(calls)), strict=True
            )
            for _, results in sorted(said, key=itemgetter(0)):
                yield from (heard(one, given) for one in results)

        return run

    def close(self) -> None:
        """End the workers; and the cluster, or what holds it, if it was not there before."""
        for handle in self._handles:
            with suppress(RayError):
                ray.kill(handle)
        self._handles.clear()
        if self._ours:
            ray.shutdown()
        self._ours = False

    def _begun(self) -> list[Any]:
        """The workers, begun if need be."""
        workers = self.connect()
        if not self._handles:
            cpus, gpus = self.room
            kind = ray.remote(Worker).options(
                num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=AGAIN
            )
            self._handles += [kind.remote(self.make) for _ in range(workers)]
        return self._handles


def _connect(address: str | None, **own: int) -> None:
    """Reach a cluster; or start one, which has all that this machine has, or what is its own.

    Raises:
        ConfigError: there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or a new cluster reports to its makers
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", include_dashboard=False, **own, **quiet)
        return
    host, _, port = address.rpartition(":")
    try:
        # Ray itself asks for minutes
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"engine.address={address!r} is no cluster of Ray's that lets us in: {said}; say its "
            "host:port, and its token by RAY_AUTH_TOKEN, or leave it out for one of this machine"
        ) from None


def _fitting(wanted: int | None, room: Room) -> int:
    """As many workers as are wanted, or as fit.

    Raises:
        ConfigError: they do not fit.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = int(sum(min(m.get("CPU", 0) // room.cpus, _accelerated(m, room)) for m in machines))
    if 1 <= (wanted or 1) <= fit:
        return wanted or fit
    each = "an accelerator" if room.gpus else f"engine.threads={room.cpus} cores"
    raise ConfigError(
        f"engine.workers={wanted or 1}, with {each} each, do not fit the cluster, which has room "
        f"for {fit}: lower one of them (of a run that has begun, in its settings.toml), or name a "
        "larger cluster by engine.address"
    )


def _accelerated(machine: Mapping[str, float], room: Room) -> float:
    return machine.get("GPU", 0.0) // room.gpus if room.gpus else inf


def _answers(calls: Sequence[Any]) -> list[list[list[Said]]]:
    """What every worker says.

    Raises:
        FedGenError: of a worker's.
        WorkerError: one was lost too often.
    """
    try:
        return ray.get(list(calls))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, FedGenError) else error) from None
    except RayError as error:
        why = str(error).strip().rpartition("\n")[2]
        raise WorkerError(
            f"engine.name='ray': a worker was lost, and its work was tried {AGAIN + 1} times, or "
            "it never began: if memory ran out, lower engine.stack or engine.workers; Ray says: "
            f"{why}"
        ) from None
