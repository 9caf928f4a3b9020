"""Everything that a user can cause, as one tree: the command prints one line and exits with 2."""

from collections.abc import Iterable


class FedGenError(Exception):
    """A mistake that its user can mend; the message names what is wrong and the way out."""


class ConfigError(FedGenError):
    """A setting, or two settings together, cannot be carried out."""


class DataError(FedGenError):
    """The data are missing, empty, or not what the settings say."""


class AdapterError(FedGenError):
    """An adapter's file cannot be used with this backbone."""


class CheckpointError(FedGenError):
    """A run's folder, or a checkpoint in it, is missing, incomplete or altered."""


class TrainingError(FedGenError):
    """Training left the finite numbers."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for a tensor, on a processor or an accelerator, or for anything."""
    no_room = ("can't allocate memory", "out of memory")  # torch's words, in a RuntimeError
    return isinstance(error, MemoryError) or any(words in str(error) for words in no_room)


class MissingExtraError(FedGenError):
    """An optional library is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        libraries = " ".join(_requirements(extra))
        super().__init__(f"{what} needs the extra {extra}: pip install {libraries}")


class RefusedError(FedGenError):
    """A message over a network is not what was agreed; the run goes on without it."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class QuorumError(FedGenError):
    """Too few sites answered a round in time; the model is as it was."""


class WorkerError(FedGenError):
    """A simulation's workers were lost, more often than their work is done again."""


class CarrierError(FedGenError):
    """Messages cannot be carried: what carries them is away, refuses, or has given the run up."""


def find_nearest(name: str, known: Iterable[str]) -> str | None:
    """The name among these that this one is near to; none where there is no such."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of these; empty where none is near."""
    suggestion = find_nearest(name, known)
    return f"did you mean {suggestion!r}?" if suggestion else ""


def _requirements(extra: str) -> list[str]:
    """The libraries of an extra, in quotes: our own name is at no index."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    needed = map(Requirement, requires("fedgen-edge") or ())
    optional = [r for r in needed if r.marker and r.marker.evaluate({"extra": extra})]
    return [f'"{requirement.name}{requirement.specifier}"' for requirement in optional]
