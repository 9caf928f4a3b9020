"""One page for a run, or several side by side: tables, pictures, samples; no script, no request."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedgen_edge import files
from fedgen_edge.errors import CheckpointError
from fedgen_edge.experiments import plots, summary, targets
from fedgen_edge.experiments.apart import distances
from fedgen_edge.experiments.called import CALLED, called, noted
from fedgen_edge.experiments.comparison import SEED, compared
from fedgen_edge.experiments.diagnose import diagnose
from fedgen_edge.experiments.drawing import standalone
from fedgen_edge.experiments.gains import gains, per_client, signed
from fedgen_edge.experiments.merging import layer_rows
from fedgen_edge.experiments.summary import (
    ModelRow,
    RunFiles,
    number,
    size,
)

CAPTIONS = {
    "validation": ("Learning", "Validation {name} after each round."),
    "clients": (
        "Every client",
        "Test {name} on each client's own {material}, the worst on top; left is better.",
    ),
    "gains": (
        "Who gains from a personal adapter",
        "Percent by which each client's test {name} falls; hollow: clients that never took part.",
    ),
    "bytes": ("Quality for bytes", "Validation {name} against what clients have sent."),
    "clock": ("Quality for time", "Validation {name} against the virtual clock of the devices."),
    "training": ("Training loss", "Mean of the cohort; the band spans its clients."),
    "data": ("Who holds what", "Training data of each client, the largest on top."),
    "error": (
        "What averaging misses",
        "How far a layer's merged product is from the mean of the clients' products, as a share of "
        "it: median over layers; the band spans the run's.",
    ),
    "rank": (
        "Effective rank",
        "Of a layer's merged product: median over layers; the band spans the run's.",
    ),
    "norms": ("A against B", "Frobenius norms: medians over layers; the bands span them."),
    "drift": (
        "Client drift",
        "How far clients move in a round, in effective weights (of a layer, its product B A): mean "
        "over the cohort; the band spans the run's clients.",
    ),
    "cosine": (
        "Do clients agree?",
        "Mean cosine between two clients' changes of effective weights; below zero they cancel in "
        "the mean.",
    ),
    "comparison": ("Learning, side by side", "Mean over seeds; the band spans them."),
}
NAMED = 5
"""Models whose means a sentence can name."""
PROVENANCE = {
    "fedgen-edge": "version",
    "PyTorch": "torch",
    "Python": "python",
    "transformers": "libraries.transformers",
    "PEFT": "libraries.peft",
    "diffusers": "libraries.diffusers",
    "Hardware": "hardware",
    "Device": "device",
    "Precision": "precision",
    "Threads": "threads",
    "Clients in a stack": "stack",
    "Backbone": "backbone.path",
    "Backbone's SHA-256": "backbone.sha256",
    "Backbone's parameters": "backbone.parameters",
    "Adapter's parameters": "adapter_parameters",
    "Adapter, bytes": "adapter_bytes",
    "Full model in float32, bytes": "full_bytes",
    "Duplicates left out": "duplicates",
    "Blank texts left out": "blanks",
}
"""What the page says of a run's origin, and where run.json has it."""


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of one run (and its RUN/plots/*.svg), or of several, compared.

    Raises:
        CheckpointError: a run's folder is missing, incomplete or altered, or their tasks differ.
    """
    found = [summary.read(folder) for folder in runs]
    if len(names := {run.measure.name: run.folder for run in found}) > 1:
        told = " and ".join(f"{folder} by {name}" for name, folder in names.items())
        raise CheckpointError(f"runs of different tasks cannot be compared: {told}")
    page = compared(found) if len(found) > 1 else single(found[0])
    if len(found) == 1:
        for name, svg in page["pictures"].items():
            files.write(runs[0] / "plots" / f"{name}.svg", _bytes(standalone(svg)))
    files.write(out, _bytes(render(page)))
    return out


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML; whatever a run says is escaped, pictures of ours aside."""
    here = FileSystemLoader(Path(__file__).parent)
    engine = Environment(
        loader=here,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"number": number, "size": size, "signed": signed, "after": str.removeprefix}
    pictures = {name: Markup(svg) for name, svg in page["pictures"].items()}
    template = engine.get_template("report.html.jinja")
    return template.render({**page, "pictures": pictures, "captions": CAPTIONS})


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def single(run: RunFiles) -> dict[str, Any]:
    """What the page of one run shows."""
    return {
        "kind": "run",
        "title": run.folder.resolve().name,
        "headline": headline(run),
        "note": noted([("", run)]),
        "measure": run.measure,
        "models": (models := summary.judged(run)),
        "newcomers": summary.judged(run, newcomers=True),
        "gains": gains(run),
        "layers": layer_rows(run),
        "by_word": any(not math.isnan(row.word) for row in models),
        "clients": per_client(run),
        "distances": distances(run),
        "compared": next((row for row in run.distances if row["client"] is None), {}),
        "uplink": summary.uplink(run),
        "adapter_bytes": run.facts.get("adapter_bytes", 0),
        "full_bytes": run.facts.get("full_bytes", 0),
        "findings": diagnose(run),
        "costs": targets.costs(run),
        "pictures": plots.pictures(run) | plots.pictures(run, targets.PICTURES),
        "samples": samples(run),
        "provenance": provenance(run),
        "changes": summary.describe_changes(run),
        "settings": (run.folder / "settings.toml").read_text("utf-8"),
    }


def headline(run: RunFiles) -> str:
    """The run in a few short sentences."""
    sent, new = summary.uplink(run), summary.judged(run, newcomers=True)
    method = run.settings.get("method.name", "training")
    text = f"{len(run.clients)} clients, {len(run.rounds)} rounds of {method}."
    if told := _means(run, summary.judged(run)):
        text += f" Mean {run.measure.name} on held-out {run.measure.material}: {told}."
    text += _apart(run)
    if new:
        text += f" For the {new[0].clients} who never trained: {_means(run, new)}."
    if not math.isnan(sent.saving):
        text += (
            f" Clients sent {size(sent.up)}, where the full model would have been "
            f"{size(sent.full)}: {sent.saving:.2f}\N{NO-BREAK SPACE}% less."
        )
    return text


def _apart(run: RunFiles) -> str:
    """How far samples lie from real pictures, as a sentence; empty where nothing was judged."""
    whole = next((row for row in run.distances if row["client"] is None), None)
    if whole is None:
        return ""
    rows = distances(run)
    told = ", ".join(f"{number(row.pooled)} with {called(run, row.model)}" for row in rows)
    floor = f" (real against real: {number(whole['floor'])})" if "floor" in whole else ""
    return f" {whole['distance']} of {whole['made']:,} samples: {told}{floor}."


def _means(run: RunFiles, rows: Sequence[ModelRow]) -> str:
    usual = [row for row in rows if row.model in CALLED]
    named = rows if len(rows) <= NAMED else usual
    told = ", ".join(f"{number(row.mean)} with {called(run, row.model)}" for row in named)
    return told + f" ({len(rows) - len(named)} more in the table)" * (len(rows) > len(named))


def samples(run: RunFiles) -> list[dict[str, Any]]:
    """Samples side by side: for each client and prompt, one text or picture a model."""
    texts = {(r["model"], r["client"], r["prompt"]): _shown(run, r) for r in run.samples}
    models = list(dict.fromkeys(model for model, _, _ in texts))
    asked = list(dict.fromkeys((client, prompt) for _, client, prompt in texts))
    of_clients = [(client, prompt) for client, prompt in asked if client]
    return [
        {
            "client": client,
            "prompt": prompt,
            "texts": [
                (m, texts.get((m, client, prompt), texts.get((m, None, prompt), {})))
                for m in models
            ],
        }
        for client, prompt in of_clients or asked
    ]


def _shown(run: RunFiles, row: Mapping[str, Any]) -> dict[str, str]:
    """A sample as the page has it: its text, or its picture as a `data:` address."""
    if "picture" not in row:
        return {"text": row.get("text", "")}
    try:
        content = (run.folder / row["picture"]).read_bytes()
    except OSError:
        raise CheckpointError(f"{run.folder / row['picture']} is missing: run again") from None
    return {"picture": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def provenance(run: RunFiles) -> list[tuple[str, str]]:
    """Where the run's numbers come from: versions, machine, scale, seed, seconds."""
    facts = dict(summary.dotted(run.facts))
    known = [(label, facts[key]) for label, key in PROVENANCE.items() if key in facts]
    spent = [(f"Seconds, {k[8:]}", v) for k, v in facts.items() if k.startswith("seconds.")]
    items = sum(row["items"] for row in run.clients)
    scale = [(f"Training {run.measure.items}", items), ("Seed", run.settings.get(SEED, "?"))]
    return [
        (label, f"{round(value, 1):,}" if isinstance(value, int | float) else str(value))
        for label, value in (*known, *scale, *spent)
    ]
