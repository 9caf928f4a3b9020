"""One HTML page for one or several runs: tables, plots and samples; no scripts, no requests."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedgen_edge import files
from fedgen_edge.errors import CheckpointError
from fedgen_edge.report import costs, plots, summary
from fedgen_edge.report.compare import SEED, make_comparison_page
from fedgen_edge.report.diagnose import diagnose
from fedgen_edge.report.gains import format_signed, gains, make_client_rows
from fedgen_edge.report.layers import layer_rows
from fedgen_edge.report.sample_distances import distances
from fedgen_edge.report.style import make_standalone
from fedgen_edge.report.summary import ModelRow, RunFiles
from fedgen_edge.report.wording import MODEL_PHRASES, describe_model, explain_global
from fedgen_edge.runs.formatting import number, size

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
MAX_NAMED_MODELS = 5
"""Maximum models whose means a sentence names."""
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
"""The page's labels of provenance, and their fields in run.json."""


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of one run (and its RUN/plots/*.svg), or of several, compared.

    Raises:
        CheckpointError: a run's folder is missing, incomplete or altered, or their tasks differ.
    """
    run_files = [summary.read(folder) for folder in runs]
    if len(names := {run.measure.name: run.folder for run in run_files}) > 1:
        listing = " and ".join(f"{folder} by {name}" for name, folder in names.items())
        raise CheckpointError(f"runs of different tasks cannot be compared: {listing}")
    page = make_comparison_page(run_files) if len(run_files) > 1 else make_run_page(run_files[0])
    if len(run_files) == 1:
        for name, svg in page["pictures"].items():
            files.write(runs[0] / "plots" / f"{name}.svg", _bytes(make_standalone(svg)))
    files.write(out, _bytes(render(page)))
    return out


def render(page: Mapping[str, Any]) -> str:
    """Render the page as HTML; everything from a run is escaped, except our own plots."""
    here = FileSystemLoader(Path(__file__).parent)
    engine = Environment(
        loader=here,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {
        "number": number,
        "size": size,
        "signed": format_signed,
        "after": str.removeprefix,
    }
    svgs = {name: Markup(svg) for name, svg in page["pictures"].items()}
    template = engine.get_template("report.html.jinja")
    return template.render({**page, "pictures": svgs, "captions": CAPTIONS})


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def make_run_page(run: RunFiles) -> dict[str, Any]:
    """Return the content of the page of one run."""
    return {
        "kind": "run",
        "title": run.folder.resolve().name,
        "headline": headline(run),
        "note": explain_global([("", run)]),
        "measure": run.measure,
        "models": (models := summary.summarize_models(run)),
        "newcomers": summary.summarize_models(run, newcomers=True),
        "gains": gains(run),
        "layers": layer_rows(run),
        "by_word": any(not math.isnan(row.word) for row in models),
        "clients": make_client_rows(run),
        "distances": distances(run),
        "compared": next((row for row in run.distances if row["client"] is None), {}),
        "uplink": summary.uplink(run),
        "adapter_bytes": run.facts.get("adapter_bytes", 0),
        "full_bytes": run.facts.get("full_bytes", 0),
        "findings": diagnose(run),
        "costs": costs.costs(run),
        "pictures": plots.draw_plots(run) | plots.draw_plots(run, costs.PLOTS),
        "samples": samples(run),
        "provenance": provenance(run),
        "changes": summary.describe_changes(run),
        "settings": (run.folder / "settings.toml").read_text("utf-8"),
    }


def headline(run: RunFiles) -> str:
    """Summarize the run in a few short sentences."""
    sent, new = summary.uplink(run), summary.summarize_models(run, newcomers=True)
    method = run.settings.get("method.name", "training")
    text = f"{len(run.clients)} clients, {len(run.rounds)} rounds of {method}."
    if means := _means(run, summary.summarize_models(run)):
        text += f" Mean {run.measure.name} on held-out {run.measure.material}: {means}."
    text += _describe_distances(run)
    if new:
        text += f" For the {new[0].clients} who never trained: {_means(run, new)}."
    if not math.isnan(sent.saving):
        text += (
            f" Clients sent {size(sent.up)}, where the full model would have been "
            f"{size(sent.full)}: {sent.saving:.2f}\N{NO-BREAK SPACE}% less."
        )
    return text


def _describe_distances(run: RunFiles) -> str:
    """Describe the samples' distance from real images; empty if it was not measured."""
    pooled_row = next((row for row in run.distances if row["client"] is None), None)
    if pooled_row is None:
        return ""
    rows = distances(run)
    listing = ", ".join(
        f"{number(row.pooled)} with {describe_model(run, row.model)}" for row in rows
    )
    floor = f" (real against real: {number(pooled_row['floor'])})" if "floor" in pooled_row else ""
    return f" {pooled_row['distance']} of {pooled_row['made']:,} samples: {listing}{floor}."


def _means(run: RunFiles, rows: Sequence[ModelRow]) -> str:
    usual = [row for row in rows if row.model in MODEL_PHRASES]
    named = rows if len(rows) <= MAX_NAMED_MODELS else usual
    listing = ", ".join(
        f"{number(row.mean)} with {describe_model(run, row.model)}" for row in named
    )
    return listing + f" ({len(rows) - len(named)} more in the table)" * (len(rows) > len(named))


def samples(run: RunFiles) -> list[dict[str, Any]]:
    """Return samples side by side: for each client and prompt, one text or image per model."""
    texts = {(r["model"], r["client"], r["prompt"]): _render_sample(run, r) for r in run.samples}
    models = list(dict.fromkeys(model for model, _, _ in texts))
    prompts = list(dict.fromkeys((client, prompt) for _, client, prompt in texts))
    of_clients = [(client, prompt) for client, prompt in prompts if client]
    return [
        {
            "client": client,
            "prompt": prompt,
            "texts": [
                (m, texts.get((m, client, prompt), texts.get((m, None, prompt), {})))
                for m in models
            ],
        }
        for client, prompt in of_clients or prompts
    ]


def _render_sample(run: RunFiles, row: Mapping[str, Any]) -> dict[str, str]:
    """Return a sample for the page: its text, or its image as a `data:` URL."""
    if "picture" not in row:
        return {"text": row.get("text", "")}
    try:
        content = (run.folder / row["picture"]).read_bytes()
    except OSError:
        raise CheckpointError(f"{run.folder / row['picture']} is missing: run again") from None
    return {"picture": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def provenance(run: RunFiles) -> list[tuple[str, str]]:
    """Return the origin of the run's numbers: versions, machine, scale, seed, seconds."""
    facts = dict(summary.flatten_table(run.facts))
    known = [(label, facts[key]) for label, key in PROVENANCE.items() if key in facts]
    durations = [(f"Seconds, {k[8:]}", v) for k, v in facts.items() if k.startswith("seconds.")]
    items = sum(row["items"] for row in run.clients)
    scale = [(f"Training {run.measure.items}", items), ("Seed", run.settings.get(SEED, "?"))]
    return [
        (label, f"{round(value, 1):,}" if isinstance(value, int | float) else str(value))
        for label, value in (*known, *scale, *durations)
    ]
