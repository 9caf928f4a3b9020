"""Diagnose how a federation fails from a run's numbers, in plain words.

Source: the failure signatures of FedGen-Edge (arXiv 2511.11585), and those its baselines show.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from fedgen_edge.report import local_only, signatures
from fedgen_edge.report.learning_rate import rate_too_high
from fedgen_edge.report.summary import BACKBONE, GLOBAL, PERSONAL, RunFiles
from fedgen_edge.report.wording import reword_for_clusters

Severity = Literal["problem", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "good")


class Finding(NamedTuple):
    """What is wrong, the numbers that show it, and what to try."""

    severity: Severity
    title: str
    evidence: str
    advice: str = ""


def diagnose(run: RunFiles) -> list[Finding]:
    """Return every signature that fires, the worst first; a healthy run gets one good finding."""
    explained = HIGH_RATE_SYMPTOMS if rate_too_high(run) else ()
    findings = [
        Finding(
            severity,
            reword_for_clusters(run, title),
            reword_for_clusters(run, evidence),
            reword_for_clusters(run, _fill_in_values(advice, run)),
        )
        for severity, title, check, advice in SIGNATURES
        if check not in explained and (evidence := check(run))
    ]
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity)) or [
        _make_healthy_finding(run)
    ]


def _make_healthy_finding(run: RunFiles) -> Finding:
    scope = f"{len(run.rounds)} rounds, {len(run.clients)} clients, {len(run.evaluation)} tests"
    return Finding("good", "Nothing found", f"{len(SIGNATURES)} checks over {scope}.")


worse_than_backbone = partial(signatures.find_worse_clients, model=GLOBAL, reference=BACKBONE)
worse_after_tuning = partial(signatures.find_worse_clients, model=PERSONAL, reference=GLOBAL)
HIGH_RATE_SYMPTOMS = (
    signatures.diverges,
    signatures.relapses,
    signatures.swings,
    signatures.stalls,
    signatures.fallbacks,
    local_only.alone_is_better,
    local_only.alone_beats_global,
    local_only.some_better_alone,
    signatures.updates_cancel,
    signatures.rank_collapses,
    worse_than_backbone,
    worse_after_tuning,
)
"""Findings that a learning rate that is too high explains without blaming data or clients."""
Signature = tuple[Severity, str, Callable[[RunFiles], str | None], str]
SIGNATURES: tuple[Signature, ...] = (
    ("problem", "Training broke down: a loss is not a number", signatures.not_finite,
     "Lower [training.lr], clip more ([training.clip]), or use backbone.precision=float32."),
    ("problem", "The learning rate is too high: training made the model worse", rate_too_high,
     "Lower [training.lr] tenfold, and again until the loss falls: LoRA with AdamW mostly learns "
     "at 1e-4 to 1e-2. If a server has a rate of its own, [method.server_lr], lower that too."),
    ("problem", "Training diverges", signatures.diverges,
     "Lower [training.lr], warm it up ([training.warmup]), or do less work a round."),
    ("warning", "Validation is past its best", signatures.relapses,
     "Stop earlier ([federation.rounds]), or let [training.lr] fall ([training.schedule])."),
    ("warning", "Validation swings from round to round", signatures.swings,
     "Lower [training.lr], draw more clients (federation.cohort), or train less (training.steps)."),
    ("warning", "The federation learns next to nothing", signatures.stalls,
     "Raise [training.lr] or [training.epochs], or adapt more layers "
     "(adapter.target_modules=all-linear)."),
    ("warning", "Rounds pass that nobody finishes", signatures.idle_rounds,
     "Allow more time ([federation.deadline]) or ask more clients ([federation.over_selection]); "
     "devices.available and devices.fails say who is there, and stays."),
    ("warning", "The global adapter is worse than the backbone for some clients",
     worse_than_backbone,
     "Their data are unlike the others': give them personal adapters ([personal.epochs]), or "
     "federate them apart."),
    ("warning", "Personal tuning makes some clients worse",
     worse_after_tuning,
     "They overfit: lower [personal.lr] or [personal.epochs], pull towards the global adapter "
     "([personal.proximal_mu]), and keep [personal.fallback] on."),
    ("warning", "Most clients gain nothing from personal tuning", signatures.fallbacks,
     "Lower [personal.lr]; if that does not help, the clients are alike and the global adapter is "
     "all they need."),
    ("warning", "The federation does not help: clients do better alone", local_only.alone_is_better,
     "They differ much, or train too little: personalise ([personal.epochs]), keep some layers "
     "at the clients (method.name=fedper), or raise [federation.rounds]."),
    ("warning", "Some clients do better alone", local_only.some_better_alone,
     "They differ from the others, or tuning was short: raise [personal.epochs], or have them keep "
     "what they train alone."),
    ("note", "Clients alone do better than the global adapter, not than personal ones",
     local_only.alone_beats_global, "They differ much: serve the personal adapters."),
    ("warning", "Some clients have too little data", signatures.too_little_data,
     "Raise [partition.minimum], have fewer clients, or let them use the global adapter."),
    ("warning", "Clients pull the adapter apart", signatures.updates_cancel,
     "Lower [training.lr], train less in each round (training.steps), or pull towards the received "
     "adapter (method.name=fedprox)."),
    ("warning", "Adapters have lost their rank (rank collapse)", signatures.rank_collapses,
     "Lower [training.weight_decay] or [training.lr], or merge products (method.name=flexlora), "
     "which keeps A's rank; if the quality will do, so will a lower [adapter.rank]."),
    ("warning", "Samples are too much alike (mode collapse)", signatures.modes_collapse,
     "Look at the grids. Of a GAN, penalise the critic more ([gan.r1]) or slow it down "
     "([gan.critic_rate]); of another model, train longer, or take [evaluation.sample_steps] up."),
    ("note", "The backbone's own samples are too much alike", signatures.backbone_lacks_diversity,
     "What is trained on it begins there: train it for longer ([pretrain.rounds], "
     "[pretrain.steps]), or take another."),
    ("note", "The samples' distance rests on few pictures", signatures.too_few_images,
     "Raise [image_metrics.samples], or choose [image_metrics.features] of fewer numbers."),
    ("note", "One client outweighs all others", signatures.one_client_dominates,
     "It steers the mean: read the worst client's numbers, and cap a round with training.steps."),
    ("note", "Validation reads little", signatures.validation_is_noisy,
     "Do not trust small steps; raise [evaluation.blocks] (0 is all) or [data.validation]."),
    ("note", "Some clients were never drawn", signatures.never_sampled,
     "Raise [federation.rounds] or the cohort (federation.cohort)."),
    ("note", "The run has not finished", signatures.stops_early, "Go on with `fedgen resume`."),
)  # fmt: skip
"""The signatures: severity, name, the check that returns the evidence, and what to try."""


def _fill_in_values(advice: str, run: RunFiles) -> str:
    """Add to each `[setting]` its value in this run, as in TOML."""
    assignments = {name: f"{name}={json.dumps(value)}" for name, value in run.settings.items()}
    return re.sub(r"\[([\w.]+)\]", lambda found: assignments.get(found[1], found[1]), advice)
