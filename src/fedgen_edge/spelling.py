"""What a user may have meant by a name that is not known."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name among these that this one is near to; none where there is no such."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of these; empty where none is near."""
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else ""
