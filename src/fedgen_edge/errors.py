"""All errors that a user can cause, as one tree: the command prints one line and exits with 2."""

from collections.abc import Iterable


class FedGenError(Exception):
    """A mistake that the user can fix; the message says what is wrong and how to fix it."""


class ConfigError(FedGenError):
    """A setting, or two settings together, cannot be carried out."""


class DataError(FedGenError):
    """The data are missing, empty, or do not match the settings."""


class AdapterError(FedGenError):
    """An adapter's file cannot be used with this backbone."""


class CheckpointError(FedGenError):
    """A run's folder, or a checkpoint in it, is missing, incomplete or altered."""


class TrainingError(FedGenError):
    """Training produced values that are not finite."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: for a tensor, on the CPU or an accelerator, or for any object."""
    no_room = ("can't allocate memory", "out of memory")  # torch's words, in a RuntimeError
    return isinstance(error, MemoryError) or any(words in str(error) for words in no_room)


class MissingExtraError(FedGenError):
    """An optional library is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        libraries = " ".join(_requirements(extra))
        super().__init__(f"{what} needs the extra {extra}: pip install {libraries}")


class RefusedError(FedGenError):
    """A message over a network breaks the protocol; the run goes on without it."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class QuorumError(FedGenError):
    """Too few sites answered a round in time; the model is unchanged."""


class WorkerError(FedGenError):
    """A simulation's workers died more often than their work is retried."""


class CarrierError(FedGenError):
    """Messages cannot be delivered: the carrier is unreachable, refuses, or gave the run up."""


def find_nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to this one, or None if none is close."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a question that names the closest known name; empty if none is close."""
    suggestion = find_nearest(name, known)
    return f"did you mean {suggestion!r}?" if suggestion else ""


def _requirements(extra: str) -> list[str]:
    """Return an extra's libraries, quoted: this package itself is on no index."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    needed = map(Requirement, requires("fedgen-edge") or ())
    optional = [r for r in needed if r.marker and r.marker.evaluate({"extra": extra})]
    return [f'"{requirement.name}{requirement.specifier}"' for requirement in optional]
