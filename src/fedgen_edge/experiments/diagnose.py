"""How federations fail, found in a run's numbers and said in plain words.

Source: the failure signatures of FedGen-Edge (arXiv 2511.11585), and those its baselines show.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from fedgen_edge.experiments import alone, checks
from fedgen_edge.experiments.called import reworded
from fedgen_edge.experiments.learning_rate import rate_too_high
from fedgen_edge.experiments.summary import BACKBONE, GLOBAL, PERSONAL, RunFiles

Severity = Literal["problem", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "good")


class Finding(NamedTuple):
    """What is wrong, by which numbers, and what to try."""

    severity: Severity
    title: str
    evidence: str
    advice: str = ""


def diagnose(run: RunFiles) -> list[Finding]:
    """Every signature that fires, the gravest first; a healthy run gets one good finding."""
    explained = OF_A_HIGH_RATE if rate_too_high(run) else ()
    found = [
        Finding(
            severity,
            reworded(run, title),
            reworded(run, evidence),
            reworded(run, _with_values(advice, run)),
        )
        for severity, title, check, advice in SIGNATURES
        if check not in explained and (evidence := check(run))
    ]
    return sorted(found, key=lambda f: SEVERITIES.index(f.severity)) or [_nothing(run)]


def _nothing(run: RunFiles) -> Finding:
    judged = f"{len(run.rounds)} rounds, {len(run.clients)} clients, {len(run.evaluation)} tests"
    return Finding("good", "Nothing found", f"{len(SIGNATURES)} checks over {judged}.")


worse_than_backbone = partial(checks.losers, model=GLOBAL, reference=BACKBONE)
worse_by_tuning = partial(checks.losers, model=PERSONAL, reference=GLOBAL)
OF_A_HIGH_RATE = (
    checks.diverges,
    checks.relapses,
    checks.swings,
    checks.stuck,
    checks.fallbacks,
    alone.alone_is_better,
    alone.alone_beats_global,
    alone.better_alone,
    checks.pulled_apart,
    checks.rank_collapses,
    worse_than_backbone,
    worse_by_tuning,
)
"""What a learning rate that is too high explains: data and clients are not to blame."""
Signature = tuple[Severity, str, Callable[[RunFiles], str | None], str]
SIGNATURES: tuple[Signature, ...] = (
    ("problem", "Training broke down: a loss is not a number", checks.not_finite,
     "Lower [training.lr], clip more ([training.clip]), or use backbone.precision=float32."),
    ("problem", "The learning rate is too high: training made the model worse", rate_too_high,
     "Lower [training.lr] tenfold, and again until the loss falls: LoRA with AdamW mostly learns "
     "at 1e-4 to 1e-2. If a server has a rate of its own, [method.server_lr], lower that too."),
    ("problem", "Training diverges", checks.diverges,
     "Lower [training.lr], warm it up ([training.warmup]), or do less work a round."),
    ("warning", "Validation is past its best", checks.relapses,
     "Stop earlier ([federation.rounds]), or let [training.lr] fall ([training.schedule])."),
    ("warning", "Validation swings from round to round", checks.swings,
     "Lower [training.lr], draw more clients (federation.cohort), or train less (training.steps)."),
    ("warning", "The federation learns next to nothing", checks.stuck,
     "Raise [training.lr] or [training.epochs], or adapt more layers "
     "(adapter.target_modules=all-linear)."),
    ("warning", "Rounds pass that nobody finishes", checks.idle_rounds,
     "Allow more time ([federation.deadline]) or ask more clients ([federation.over]); "
     "devices.available and devices.fails say who is there, and stays."),
    ("warning", "The global adapter is worse than the backbone for some clients",
     worse_than_backbone,
     "Their data are unlike the others': give them personal adapters ([personal.epochs]), or "
     "federate them apart."),
    ("warning", "Personal tuning makes some clients worse",
     worse_by_tuning,
     "They overfit: lower [personal.lr] or [personal.epochs], pull towards the global adapter "
     "([personal.pull]), and keep [personal.fallback] on."),
    ("warning", "Most clients gain nothing from personal tuning", checks.fallbacks,
     "Lower [personal.lr]; if that does not help, the clients are alike and the global adapter is "
     "all they need."),
    ("warning", "The federation does not help: clients do better alone", alone.alone_is_better,
     "They differ much, or train too little: personalise ([personal.epochs]), keep some layers "
     "at the clients (method.name=fedper), or raise [federation.rounds]."),
    ("warning", "Some clients do better alone", alone.better_alone,
     "They differ from the others, or tuning was short: raise [personal.epochs], or have them keep "
     "what they train alone."),
    ("note", "Clients alone do better than the global adapter, not than personal ones",
     alone.alone_beats_global, "They differ much: serve the personal adapters."),
    ("warning", "Some clients have too little data", checks.too_little_data,
     "Raise [partition.minimum], have fewer clients, or let them use the global adapter."),
    ("warning", "Clients pull the adapter apart", checks.pulled_apart,
     "Lower [training.lr], train less in each round (training.steps), or pull towards the received "
     "adapter (method.name=fedprox)."),
    ("warning", "Adapters have lost their rank (rank collapse)", checks.rank_collapses,
     "Lower [training.weight_decay] or [training.lr], or merge products (method.name=flexlora), "
     "which keeps A's rank; if the quality will do, so will a lower [adapter.rank]."),
    ("warning", "Samples are too much alike (mode collapse)", checks.collapsed,
     "Look at the grids. Of a GAN, penalise the critic more ([gan.r1]) or slow it down "
     "([gan.critic_rate]); of another model, train longer, or take [evaluation.sample_steps] up."),
    ("note", "The backbone's own samples are too much alike", checks.began_alike,
     "What is trained on it begins there: train it for longer ([pretrain.rounds], "
     "[pretrain.steps]), or take another."),
    ("note", "The samples' distance rests on few pictures", checks.too_few_pictures,
     "Raise [judging.samples], or choose [judging.features] of fewer numbers."),
    ("note", "One client outweighs all others", checks.lopsided,
     "It steers the mean: read the worst client's numbers, and cap a round with training.steps."),
    ("note", "Validation reads little", checks.noisy_judge,
     "Do not trust small steps; raise [evaluation.blocks] (0 is all) or [data.validation]."),
    ("note", "Some clients were never drawn", checks.never_drawn,
     "Raise [federation.rounds] or the cohort (federation.cohort)."),
    ("note", "The run has not finished", checks.unfinished, "Go on with `fedgen resume`."),
)  # fmt: skip
"""What to look for: how grave, its name, the check that gives the evidence, what to try."""


def _with_values(advice: str, run: RunFiles) -> str:
    """Each `[setting]` with the value it has in this run, as TOML has it."""
    told = {name: f"{name}={json.dumps(value)}" for name, value in run.settings.items()}
    return re.sub(r"\[([\w.]+)\]", lambda found: told.get(found[1], found[1]), advice)
