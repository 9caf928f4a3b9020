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

from fedgen_edge import files, hardware
from fedgen_edge.algorithms.low_rank import find_pairs
from fedgen_edge.algorithms.methods import make_algorithm
from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import Settings, load, to_toml
from fedgen_edge.deploy.members import list_revoked, read_member_keys
from fedgen_edge.deploy.processes import ProcessExit, Supervisor
from fedgen_edge.deploy.provision.kits import check_deployable
from fedgen_edge.deploy.server import resume
from fedgen_edge.deploy.server.audit import Audit
from fedgen_edge.deploy.server.cohort import count_target_updates
from fedgen_edge.deploy.server.federation import Deployment
from fedgen_edge.deploy.server.registry import open_registry
from fedgen_edge.deploy.server.stages import iter_pauses, proceed
from fedgen_edge.deploy.settings import DeploymentSettings, hash_settings, read
from fedgen_edge.deploy.site.main import say
from fedgen_edge.errors import CarrierError, ConfigError, FedGenError
from fedgen_edge.network import messages
from fedgen_edge.network.flower.environment import environment
from fedgen_edge.network.messages import Carrier, Terms
from fedgen_edge.runs import records
from fedgen_edge.runs.build import make_task, select_drawn_leaves
from fedgen_edge.runs.provenance import facts, versions
from fedgen_edge.runs.record_types import ServerRunRecord
from fedgen_edge.runs.run import Event
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TrainableTask

KEY_POLL_SECONDS = 2.0
"""Seconds between two looks at who may take part."""


@runtime_checkable
class SiteAdmission(Protocol):
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
class ServerContext:
    """A server's folder, its backbone loaded."""

    folder: Path
    plan: DeploymentSettings
    settings: Settings
    """Of the run, resolved."""
    task: TrainableTask
    terms: Terms

    @property
    def run(self) -> Path:
        """Where the run is, as `fedgen run` would write it."""
        return self.folder / "run"

    def keys(self) -> dict[str, Path]:
        """Public keys of the sites that may take part."""
        return {
            name: self.folder / "sites" / f"{name}.pub" for name in read_member_keys(self.folder)
        }


def prepare_server(folder: Path) -> ServerContext:
    """Read a server's folder, load its backbone, and make the run or take it up again.

    Raises:
        FedGenError: something in the folder cannot be carried out, or the run rests on something
            else; nothing was written.
    """
    plan, recipe = (
        read(DeploymentSettings, folder / "federation.toml"),
        load(folder / "recipe.toml"),
    )
    check_deployable(recipe, len(read_member_keys(folder)) + len(list_revoked(folder)))
    device = hardware.device(recipe.engine.device)
    hardware.set_threads(recipe.engine.threads)
    task = make_task(replace(recipe, engine=replace(recipe.engine, compile=False)), device)
    _check_spectrum(plan, recipe, task)
    _check_gradient(plan, recipe)
    settings, sites = _resolve_settings(recipe, task, device), len(read_member_keys(folder))
    run = folder / "run"
    path = run / "run.json"
    run_facts = records.read_json(path, ServerRunRecord) if path.exists() else {}
    terms = replace(
        Terms(
            run_facts.get("run", secrets.token_hex(16)), hash_settings(recipe), task.model.sha256
        ),
        drawn=_hash_drawn_leaves(recipe, task),
        versions=versions(),
    )
    if not run_facts:
        task.model.check_peft(settings)
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_settings = resume.set_client_count(settings, sites)
        files.write(run / "settings.toml", to_toml(run_settings).encode())
        records.write_json(run / "clients.json", [])
        identity = {"run": terms.run, "recipe": terms.recipe, "drawn": terms.drawn}
        identity |= {"data_sha256": None, "duplicates": 0, "blanks": 0}
        records.write_json(run / "run.json", {**facts(task, run_settings, device), **identity})
    else:
        resume.check_resumable(run, run_facts, terms, settings)
    return ServerContext(folder, plan, settings, task, terms)


def _hash_drawn_leaves(recipe: Settings, task: TrainableTask) -> str:
    """SHA-256 of what sites draw for themselves, as this machine draws it."""
    algorithm = make_algorithm(recipe.method, adapter=recipe.adapter)
    start = algorithm.init(task.init(generator(recipe.federation.seed, "init"))).adapter
    return messages.digest(encode(select_drawn_leaves(recipe, algorithm, start)))


def _check_spectrum(plan: DeploymentSettings, recipe: Settings, task: TrainableTask) -> None:
    """Refuse a limit on products that the server cannot see: a site keeps a factor, or fixes it."""
    names, algorithm = list(task.model.leaf_shapes()), make_algorithm(recipe.method)
    private_leaves = {
        n for n in {*names} - algorithm.sends(names, None) if algorithm.trains(n, 0, 0)
    }
    is_hidden = algorithm.surveys(0) or any(
        len(private_leaves & {*pair}) == 1 for pair in find_pairs(names)
    )
    if plan.spectrum is not None and is_hidden:
        raise ConfigError(
            f"spectrum={plan.spectrum} in federation.toml needs both factors of a layer, which "
            f"sites do not send with method.name={recipe.method.name!r}: leave it out"
        )


def _check_gradient(plan: DeploymentSettings, recipe: Settings) -> None:
    """Refuse a limit on steps where the recipe has one itself."""
    t = recipe.training
    if plan.gradient is not None and (t.optimizer != "sgd" or t.clip):
        raise ConfigError(
            f"gradient={plan.gradient} in federation.toml is for SGD that does not clip, and "
            f"training.optimizer={t.optimizer!r} with training.clip={t.clip} is bounded by the "
            "recipe: leave it out"
        )


def _resolve_settings(recipe: Settings, task: TrainableTask, device: torch.device) -> Settings:
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


def make_deployment(
    context: ServerContext, carrier: Carrier, audit: Audit, tell: Callable[[str], None]
) -> Deployment:
    """The run, over a carrier; sites that may take part now have their numbers."""
    registry = open_registry(context.run / "sites.json")
    registry.enroll(list(read_member_keys(context.folder)))
    return Deployment(
        context.plan,
        context.settings,
        context.task,
        make_algorithm(context.settings.method, adapter=context.settings.adapter),
        context.terms,
        carrier,
        audit,
        registry,
        lambda: list(read_member_keys(context.folder)),
        tell,
        _PresenceWriter(context.run / "now.json"),
    )


@dataclass
class _PresenceWriter:
    """Writes down who is there, when that changes."""

    path: Path
    last_present: Sequence[str] | None = None

    def __call__(self, present: Sequence[str]) -> None:
        if present != self.last_present:
            records.write_json(self.path, {"time": time.time(), "there": list(present)})
            self.last_present = list(present)


def run_server(context: ServerContext, tell: Callable[[str], None] = say) -> Iterator[Event]:
    """Run the federation from its last commit to its end, with Flower's server and the proxy.

    Raises:
        QuorumError: too few sites, too often; the same command goes on.
        CarrierError: Flower's server is gone for long.
        CheckpointError: another process runs it, or what it wrote was altered.
    """
    os.environ.update(environment(context.folder / "flower"))
    from fedgen_edge.network.flower import runtime

    with records.lock_run(context.run), ExitStack() as stack:
        files.clean_drafts(context.run)
        if is_finished(context):
            return
        audit = Audit(context.run / "audit.jsonl")
        for child in _make_children(context, tell):
            child.start()
            stack.callback(child.stop)
        address, pauses = f"127.0.0.1:{context.plan.port}", iter_pauses(context.plan)
        ca, secret = context.folder / "ca" / "ca.crt", context.folder / "secret"
        while True:
            try:
                with (
                    runtime.hub(address, ca, secret, context.keys()) as admission,
                    _sync_sites(admission, context, tell),
                ):
                    run = make_deployment(context, admission.carrier, audit, tell)
                    for event in proceed(run, context.run):
                        pauses = iter_pauses(context.plan)
                        yield event
            except CarrierError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise
                tell(f"{error}: trying again in {pause:g} s")
                time.sleep(pause)
            else:
                return


def is_finished(context: ServerContext) -> bool:
    """Whether nothing is left to do: finished, and no site that joined lacks an adapter."""
    tuned_sites = {line["client"] for line in records.lines(context.run / "personal.jsonl")}
    joined_sites = (
        open_registry(context.run / "sites.json").weights().keys() & context.keys().keys()
    )
    return (
        records.read_json(context.run / "run.json", ServerRunRecord)["finished"]
        and joined_sites <= tuned_sites
    )


def _make_children(context: ServerContext, tell: Callable[[str], None]) -> list[Supervisor]:
    """Flower's server, and the proxy where it is this command's to run."""
    from fedgen_edge.network.flower import runtime

    state, tls = context.folder / "flower", context.folder / "tls"
    state.mkdir(mode=0o700, exist_ok=True)
    certificates = (context.folder / "ca" / "ca.crt", tls / "server.crt", tls / "server.key")
    command = runtime.superlink(
        context.plan.port, certificates, state / "superlink.db", context.folder / "secret"
    )
    children = [Supervisor(command, state / "superlink.log", _make_exit_handler("SuperLink", tell))]
    if context.plan.proxy == "nginx":
        proxy = context.folder / "proxy"
        command = [_find_nginx(), "-e", "stderr", "-p", str(proxy.resolve()), "-c", "nginx.conf"]
        on_exit, log = _make_exit_handler("proxy", tell), state / "proxy.log"
        # Its workers outlive a master that is killed, and would hold its port.
        children.append(Supervisor(command, log, on_exit, orphan_signal=signal.SIGTERM))
    return children


def _find_nginx() -> str:
    """Where Debian has it, an ordinary account does not look for programs."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin") or "nginx"


def _make_exit_handler(name: str, tell: Callable[[str], None]) -> Callable[[ProcessExit], bool]:
    def restart_after_exit(process_exit: ProcessExit) -> bool:
        tell(
            f"the {name} ended (status {process_exit.code}: "
            f"{process_exit.last_line[:200]}): starting it again"
        )
        return True

    return restart_after_exit


@contextmanager
def _sync_sites(
    admission: SiteAdmission, context: ServerContext, tell: Callable[[str], None]
) -> Iterator[None]:
    """Let sites in and out within seconds of their keys' coming and going."""
    stop = threading.Event()

    def poll_keys(registered: Mapping[str, Path]) -> None:
        while not stop.wait(KEY_POLL_SECONDS):
            current = context.keys()
            try:
                for name in current.keys() - registered.keys():
                    admission.register(name, current[name])
                    tell(f"{name} may take part")
                for name in registered.keys() - current.keys():
                    admission.unregister(name)
                    tell(f"{name} is revoked")
            except FedGenError as error:
                tell(str(error))
            else:
                registered = current

    thread = threading.Thread(target=poll_keys, args=(context.keys(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10 * KEY_POLL_SECONDS)


def describe_federation(context: ServerContext) -> str:
    """One line on what is about to run."""
    s, shapes, sites = context.settings, context.task.model.leaf_shapes(), len(context.keys())
    parameter_count = sum(torch.Size(v).numel() for v in shapes.values())
    return (
        f"{s.method.name}: {sites} sites, {count_target_updates(s.federation, sites)} a round, "
        f"{s.federation.rounds} rounds; {parameter_count:,} trained parameters; sites reach it at "
        f"{context.plan.address}"
    )
