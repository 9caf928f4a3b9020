"""What `fedgen server FOLDER` runs: Flower's SuperLink, the proxy before it, and the rounds."""

import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from fedgen_edge import files, machine
from fedgen_edge.algorithms.factors import pairs
from fedgen_edge.algorithms.methods import method
from fedgen_edge.config import Settings, load, to_toml
from fedgen_edge.deploy import begun
from fedgen_edge.deploy.audit import Audit
from fedgen_edge.deploy.client import say
from fedgen_edge.deploy.cohort import wanted
from fedgen_edge.deploy.federation import Deployment
from fedgen_edge.deploy.kits import deployable
from fedgen_edge.deploy.members import members, revoked
from fedgen_edge.deploy.processes import Ended, Kept
from fedgen_edge.deploy.roll import opened
from fedgen_edge.deploy.settings import Federation, digest, read
from fedgen_edge.deploy.stages import proceed, waits
from fedgen_edge.engines import exchange
from fedgen_edge.engines.exchange import Carrier, Terms
from fedgen_edge.engines.flower_environment import environment
from fedgen_edge.errors import CarrierError, ConfigError, FedGenError
from fedgen_edge.experiments import records
from fedgen_edge.experiments.build import drawn, task_of
from fedgen_edge.experiments.provenance import facts, versions
from fedgen_edge.experiments.record_types import ServerFacts
from fedgen_edge.experiments.run import Event
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import Learnt
from fedgen_edge.uplink.transform import encode

WATCH = 2.0
"""Seconds between two looks at who may take part."""


@runtime_checkable
class Door(Protocol):
    """Lets sites in and out while the run goes on."""

    @property
    def carrier(self) -> Carrier:
        """Reaches them."""
        ...

    def register(self, name: str, pub: Path) -> None:
        """Let one in."""
        ...

    def unregister(self, name: str) -> None:
        """Let one out, for ever."""
        ...


@dataclass(frozen=True)
class Home:
    """A server's folder, its backbone loaded."""

    folder: Path
    plan: Federation
    settings: Settings
    """Of the run, resolved."""
    task: Learnt
    terms: Terms

    @property
    def run(self) -> Path:
        """Where the run is, as `fedgen run` would write it."""
        return self.folder / "run"

    def keys(self) -> dict[str, Path]:
        """Public keys of the sites that may take part."""
        return {name: self.folder / "sites" / f"{name}.pub" for name in members(self.folder)}


def begin(folder: Path) -> Home:
    """Read a server's folder, load its backbone, and make the run or take it up again.

    Raises:
        FedGenError: something in the folder cannot be carried out, or the run rests on something
            else; nothing was written.
    """
    plan, recipe = read(Federation, folder / "federation.toml"), load(folder / "recipe.toml")
    deployable(recipe, len(members(folder)) + len(revoked(folder)))
    device = machine.device(recipe.engine.device)
    machine.set_threads(recipe.engine.threads)
    task = task_of(replace(recipe, engine=replace(recipe.engine, compile=False)), device)
    _check_spectrum(plan, recipe, task)
    _check_gradient(plan, recipe)
    settings, sites = _resolved(recipe, task, device), len(members(folder))
    run = folder / "run"
    path = run / "run.json"
    told = records.read_json(path, ServerFacts) if path.exists() else {}
    terms = replace(
        Terms(told.get("run", secrets.token_hex(16)), digest(recipe), task.model.sha256),
        drawn=_drawn(recipe, task),
        versions=versions(),
    )
    if not told:
        task.model.check_peft(settings)
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole = begun.of_sites(settings, sites)
        files.write(run / "settings.toml", to_toml(whole).encode())
        records.write_json(run / "clients.json", [])
        made = {"run": terms.run, "recipe": terms.recipe, "drawn": terms.drawn}
        made |= {"data_sha256": None, "duplicates": 0, "blanks": 0}
        records.write_json(run / "run.json", {**facts(task, whole, device), **made})
    else:
        begun.check(run, told, terms, settings)
    return Home(folder, plan, settings, task, terms)


def _drawn(recipe: Settings, task: Learnt) -> str:
    """SHA-256 of what sites draw for themselves, as this machine draws it."""
    algorithm = method(recipe.method, adapter=recipe.adapter)
    start = algorithm.init(task.init(generator(recipe.federation.seed, "init"))).adapter
    return exchange.digest(encode(drawn(recipe, algorithm, start)))


def _check_spectrum(plan: Federation, recipe: Settings, task: Learnt) -> None:
    """Refuse a limit on products that the server cannot see: a site keeps a factor, or fixes it."""
    names, algorithm = list(task.model.leaf_shapes()), method(recipe.method)
    kept = {n for n in {*names} - algorithm.sends(names, None) if algorithm.trains(n, 0, 0)}
    hidden = algorithm.surveys(0) or any(len(kept & {*pair}) == 1 for pair in pairs(names))
    if plan.spectrum is not None and hidden:
        raise ConfigError(
            f"spectrum={plan.spectrum} in federation.toml needs both factors of a layer, which "
            f"sites do not send with method.name={recipe.method.name!r}: leave it out"
        )


def _check_gradient(plan: Federation, recipe: Settings) -> None:
    """Refuse a limit on steps where the recipe has one itself."""
    t = recipe.training
    if plan.gradient is not None and (t.optimiser != "sgd" or t.clip):
        raise ConfigError(
            f"gradient={plan.gradient} in federation.toml is for SGD that does not clip, and "
            f"training.optimiser={t.optimiser!r} with training.clip={t.clip} is bounded by the "
            "recipe: leave it out"
        )


def _resolved(recipe: Settings, task: Learnt, device: torch.device) -> Settings:
    """The settings with what this machine decided; how many sites there are may change yet."""
    precision = "bf16" if task.model.dtype == torch.bfloat16 else "float32"
    return replace(
        recipe,
        backbone=replace(recipe.backbone, precision=precision),
        engine=replace(
            recipe.engine,
            name="serial",
            stack=None,
            device=str(device),
            threads=torch.get_num_threads(),
        ),
    )


def deployment(
    home: Home, carrier: Carrier, audit: Audit, tell: Callable[[str], None]
) -> Deployment:
    """The run, over a carrier; sites that may take part now have their numbers."""
    roll = opened(home.run / "sites.json")
    roll.enrol(list(members(home.folder)))
    return Deployment(
        home.plan,
        home.settings,
        home.task,
        method(home.settings.method, adapter=home.settings.adapter),
        home.terms,
        carrier,
        audit,
        roll,
        lambda: list(members(home.folder)),
        tell,
        _Seen(home.run / "now.json"),
    )


@dataclass
class _Seen:
    """Writes down who is there, when that changes."""

    path: Path
    last: Sequence[str] | None = None

    def __call__(self, there: Sequence[str]) -> None:
        if there != self.last:
            records.write_json(self.path, {"time": time.time(), "there": list(there)})
            self.last = list(there)


def conduct(home: Home, tell: Callable[[str], None] = say) -> Iterator[Event]:
    """Run the federation from its last commit to its end, with Flower's server and the proxy.

    Raises:
        QuorumError: too few sites, too often; the same command goes on.
        CarrierError: Flower's server is gone for long.
        CheckpointError: another process runs it, or what it wrote was altered.
    """
    os.environ.update(environment(home.folder / "flower"))
    from fedgen_edge.engines import flower_runtime

    with records.locked(home.run), ExitStack() as stack:
        files.sweep(home.run)
        if over(home):
            return
        audit = Audit(home.run / "audit.jsonl")
        for child in _children(home, tell):
            child.start()
            stack.callback(child.stop)
        address, pauses = f"127.0.0.1:{home.plan.port}", waits(home.plan)
        ca, secret = home.folder / "ca" / "ca.crt", home.folder / "secret"
        while True:
            try:
                with (
                    flower_runtime.hub(address, ca, secret, home.keys()) as door,
                    _kept_in_step(door, home, tell),
                ):
                    run = deployment(home, door.carrier, audit, tell)
                    for event in proceed(run, home.run):
                        pauses = waits(home.plan)
                        yield event
            except CarrierError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise
                tell(f"{error}: trying again in {pause:g} s")
                time.sleep(pause)
            else:
                return


def over(home: Home) -> bool:
    """Whether nothing is left to do: finished, and no site that joined lacks an adapter."""
    tuned = {line["client"] for line in records.lines(home.run / "personal.jsonl")}
    joined = opened(home.run / "sites.json").weights().keys() & home.keys().keys()
    return records.read_json(home.run / "run.json", ServerFacts)["finished"] and joined <= tuned


def _children(home: Home, tell: Callable[[str], None]) -> list[Kept]:
    """Flower's server, and the proxy where it is this command's to run."""
    from fedgen_edge.engines import flower_runtime

    state, tls = home.folder / "flower", home.folder / "tls"
    state.mkdir(mode=0o700, exist_ok=True)
    certificates = (home.folder / "ca" / "ca.crt", tls / "server.crt", tls / "server.key")
    command = flower_runtime.superlink(
        home.plan.port, certificates, state / "superlink.db", home.folder / "secret"
    )
    children = [Kept(command, state / "superlink.log", _ends("SuperLink", tell))]
    if home.plan.proxy == "nginx":
        proxy = home.folder / "proxy"
        command = [_nginx(), "-e", "stderr", "-p", str(proxy.resolve()), "-c", "nginx.conf"]
        ended, log = _ends("proxy", tell), state / "proxy.log"
        # Its workers outlive a master that is killed, and would hold its port.
        children.append(Kept(command, log, ended, orphaned=signal.SIGTERM))
    return children


def _nginx() -> str:
    """Where Debian has it, an ordinary account does not look for programs."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin") or "nginx"


def _ends(name: str, tell: Callable[[str], None]) -> Callable[[Ended], bool]:
    def ended(how: Ended) -> bool:
        tell(f"the {name} ended (status {how.code}: {how.line[:200]}): starting it again")
        return True

    return ended


@contextmanager
def _kept_in_step(door: Door, home: Home, tell: Callable[[str], None]) -> Iterator[None]:
    """Let sites in and out within seconds of their keys' coming and going."""
    stop = threading.Event()

    def watch(known: Mapping[str, Path]) -> None:
        while not stop.wait(WATCH):
            now = home.keys()
            try:
                for name in now.keys() - known.keys():
                    door.register(name, now[name])
                    tell(f"{name} may take part")
                for name in known.keys() - now.keys():
                    door.unregister(name)
                    tell(f"{name} is revoked")
            except FedGenError as error:
                tell(str(error))
            else:
                known = now

    thread = threading.Thread(target=watch, args=(home.keys(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10 * WATCH)


def heading(home: Home) -> str:
    """One line on what is about to run."""
    s, shapes, sites = home.settings, home.task.model.leaf_shapes(), len(home.keys())
    shared = sum(torch.Size(v).numel() for v in shapes.values())
    return (
        f"{s.method.name}: {sites} sites, {wanted(s.federation, sites)} a round, "
        f"{s.federation.rounds} rounds; {shared:,} trained parameters; sites reach it at "
        f"{home.plan.address}"
    )
