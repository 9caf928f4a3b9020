"""What a page calls a run's models, in words."""

from collections.abc import Sequence

from fedgen_edge.experiments.summary import BACKBONE, GLOBAL, LOCAL, PERSONAL, RunFiles

CALLED = {
    BACKBONE: "the frozen backbone",
    LOCAL: "training alone",
    GLOBAL: "the global adapter",
    PERSONAL: "personal adapters",
}
CHOSEN = "the chosen cluster's adapter"
"""What a client has of the server where it has several."""


def clustered(run: RunFiles) -> bool:
    """Whether clients chose from several adapters, so that none is the global one."""
    trained = (own for row in run.rounds for own in row["clients"])
    return any("cluster" in row for row in (*run.personal, *trained))


def called(run: RunFiles, model: str) -> str:
    """A model's name in a sentence."""
    return reworded(run, CALLED.get(model, model))


def reworded(run: RunFiles, text: str) -> str:
    """The text about this run, which may have no global adapter."""
    if not clustered(run):
        return text
    for name, chosen in ((CALLED[GLOBAL], CHOSEN), (_begun(CALLED[GLOBAL]), _begun(CHOSEN))):
        text = text.replace(name, chosen)
    return text


def noted(runs: Sequence[tuple[str, RunFiles]]) -> str:
    """What `global` means in tables, where it is not the global adapter; empty where it is.

    Args:
        runs: with a label each; none where there is but one run.
    """
    labels = list(dict.fromkeys(label for label, run in runs if clustered(run)))
    told = f" of {', '.join(filter(None, labels))}" if any(labels) else ""
    return f"The row or column global{told} is {CHOSEN}: what each client chose." if labels else ""


def _begun(text: str) -> str:
    return text[0].upper() + text[1:]
