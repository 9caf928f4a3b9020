"""What a method asks of the other settings: a reason against them, or none."""

from fedgen_edge.config import Settings

PLAIN = {"optimiser": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0}
"""Fields of `training` under which a step is the learning rate times the gradient."""


def anything(settings: Settings) -> str | None:
    """Every setting will do."""
    del settings
    return None


def bases(settings: Settings) -> str | None:
    """Bases are found in the first rounds, from a backbone alone."""
    if settings.adapter.initial is not None:
        given = str(settings.adapter.initial)
        return f"seeks bases of its own, and cannot with adapter.initial={given!r}: leave it out"
    if (rounds := settings.federation.rounds) < 3:
        return f"trains after two rounds, and federation.rounds={rounds}: set it to 3 or more"
    return None


def plain_sgd(settings: Settings) -> str | None:
    """A client's mean gradient must be what it moved by over rate and steps."""
    told = {k: getattr(settings.training, k) for k in PLAIN}
    wrong = [k for k, value in told.items() if value != PLAIN[k]]
    if not wrong:
        return None
    now = ", ".join(f"training.{k}={told[k]!r}" for k in wrong)
    then = ", ".join(f"training.{k}={PLAIN[k]!r}" for k in wrong)
    return f"takes plain steps of SGD for gradients, and cannot with {now}: set {then}"
