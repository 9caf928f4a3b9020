"""Names of a run's models in sentences."""

from collections.abc import Sequence

from fedgen_edge.report.summary import BACKBONE, GLOBAL, LOCAL, PERSONAL, RunFiles

MODEL_PHRASES = {
    BACKBONE: "the frozen backbone",
    LOCAL: "training alone",
    GLOBAL: "the global adapter",
    PERSONAL: "personal adapters",
}
CLUSTER_PHRASE = "the chosen cluster's adapter"
"""The server's model of a client, if the server has several."""


def is_clustered(run: RunFiles) -> bool:
    """Whether clients chose from several adapters, so that none is the global one."""
    client_rows = (own for row in run.rounds for own in row["clients"])
    return any("cluster" in row for row in (*run.personal, *client_rows))


def describe_model(run: RunFiles, model: str) -> str:
    """Return a model's name for a sentence."""
    return reword_for_clusters(run, MODEL_PHRASES.get(model, model))


def reword_for_clusters(run: RunFiles, text: str) -> str:
    """Adapt a text to this run, which may have no global adapter."""
    if not is_clustered(run):
        return text
    for phrase, replacement in (
        (MODEL_PHRASES[GLOBAL], CLUSTER_PHRASE),
        (_capitalize(MODEL_PHRASES[GLOBAL]), _capitalize(CLUSTER_PHRASE)),
    ):
        text = text.replace(phrase, replacement)
    return text


def explain_global(runs: Sequence[tuple[str, RunFiles]]) -> str:
    """Explain what `global` means in tables if it is not the global adapter; else empty.

    Args:
        runs: each with its label; an empty label if there is only one run.
    """
    labels = list(dict.fromkeys(label for label, run in runs if is_clustered(run)))
    run_labels = f" of {', '.join(filter(None, labels))}" if any(labels) else ""
    return (
        f"The row or column global{run_labels} is {CLUSTER_PHRASE}: what each client chose."
        if labels
        else ""
    )


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]
